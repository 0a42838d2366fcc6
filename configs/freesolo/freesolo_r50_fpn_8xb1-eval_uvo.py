"""Table 6.2: masks of the validation frames of UVO-Sparse."""

_base_ = './freesolo_r50_fpn_8xb1-eval_coco.py'

test_dataloader = dict(
    dataset=dict(
        type='UVODataset',
        data_root='data/uvo/',
        ann_file='FrameSet/UVO_frame_val.json',
        data_prefix=dict(img='uvo_videos_sparse_frames/'),
    )
)
test_evaluator = dict(ann_file='data/uvo/FrameSet/UVO_frame_val.json')
