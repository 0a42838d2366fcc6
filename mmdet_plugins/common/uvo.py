"""UVO's annotation files (Wang et al., "Unidentified Video Objects", ICCV 2021) as COCO ones.

UVO comes in two layouts. Frame files (UVO-Sparse: ``FrameSet/UVO_frame_*.json``) are COCO files.
Video files (UVO-Dense: ``VideoDenseSet/UVO_video_*_dense.json``, and ``VideoSparseSet``) follow
YouTube-VIS: ``videos`` with ``file_names``, one a frame, and ``annotations`` with one entry a frame
in ``segmentations``, ``bboxes`` and ``areas``, null where the object is not in sight.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hotcoco import mask as rle_ops

from ..ops.coco_json import check_coco, entry_name
from ..ops.rle import segmentation_to_rle


def coco_or_uvo(data: Any, name: str) -> dict:
    """Check a parsed file of COCO's layout or of either of UVO's, which errors call ``name``.

    Returns:
        It in COCO's layout.

    Raises:
        ValueError: It is of none of them, or broken.
    """
    if isinstance(data, Mapping) and 'videos' in data:
        try:
            data = uvo_to_coco(data)
        except ValueError as error:
            raise ValueError(f'{name}: {error}.') from None
    return check_coco(data, name)


def uvo_to_coco(data: Mapping) -> dict:
    """Turn a parsed UVO file of either layout into COCO's, one image a frame.

    Images get ``video_id`` and ``frame_idx``, annotations ``track_id`` (the id of the object in its
    video); ids of both are new. Boxes and areas that the file lacks are those of the masks.

    Raises:
        ValueError: The file is of neither layout, a field is missing or malformed, or an object
            does not fit its video; the video or annotation is named.
    """
    if 'images' in data:
        return dict(data)
    if not isinstance(data.get('videos'), list) or not isinstance(data.get('annotations'), list):
        raise ValueError(
            'not a UVO file: it has neither "images" nor "videos" and "annotations" '
            f'(it has {", ".join(map(str, data)) or "nothing"})'
        )
    images: list[dict] = []
    frames: dict[int, list[dict]] = {}
    for number, video in enumerate(data['videos']):
        with _naming(entry_name('video', number, video)):
            frames[video['id']] = [
                {
                    'id': len(images) + i,
                    'file_name': name,
                    'height': video['height'],
                    'width': video['width'],
                    'video_id': video['id'],
                    'frame_idx': i - 1,
                }
                for i, name in enumerate(video['file_names'], start=1)
            ]
            images += frames[video['id']]
    annotations: list[dict] = []
    for number, track in enumerate(data['annotations']):
        with _naming(entry_name('object', number, track)):
            annotations += _shown(track, frames, len(annotations) + 1)
    categories = data.get('categories') or [{'id': 1, 'name': 'object'}]
    return {'images': images, 'annotations': annotations, 'categories': categories}


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn what a malformed entry raises into a ``ValueError`` that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f'{where} lacks {error}') from None
    except (TypeError, IndexError) as error:
        raise ValueError(f'{where} is not laid out as UVO does it ({error})') from None
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None


def _shown(track: Mapping, frames: Mapping[int, list[dict]], first_id: int) -> list[dict]:
    """Annotations of an object in the frames of its video that show it."""
    if track['video_id'] not in frames:
        raise ValueError(f'there is no video {track["video_id"]}')
    images, segmentations = frames[track['video_id']], track['segmentations']
    if len(segmentations) != len(images):
        raise ValueError(
            f'{len(segmentations)} masks for the {len(images)} frames of video {track["video_id"]}'
        )
    annotations: list[dict] = []
    for i, (image, segmentation) in enumerate(zip(images, segmentations, strict=True)):
        if not segmentation:
            continue
        box, area = ((track.get(key) or [None] * len(images))[i] for key in ('bboxes', 'areas'))
        if box is None or area is None:
            rle = segmentation_to_rle(segmentation, (image['height'], image['width']))
            box, area = rle_ops.to_bbox(rle).tolist(), float(rle_ops.area(rle))
        annotations.append(
            {
                'id': first_id + len(annotations),
                'image_id': image['id'],
                'track_id': track['id'],
                'category_id': track.get('category_id', 1),
                'iscrowd': track.get('iscrowd', 0),
                'segmentation': segmentation,
                'bbox': box,
                'area': area,
            }
        )
    return annotations
