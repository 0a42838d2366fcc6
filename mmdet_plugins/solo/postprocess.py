from mmdet.registry import TASK_UTILS


@TASK_UTILS.register_module()
class SOLOPostProcessor:
    def __init__(self, **kwargs):
        pass
