"""The end of a process that took part in distributed training or evaluation."""

import torch.distributed as dist
from detectron2.utils import comm


def leave_process_group() -> None:
    """Close this process's groups before the interpreter ends; nothing to do without one.

    detectron2 never closes them, and ``comm`` keeps two references that outlive
    ``destroy_process_group``. A gloo thread that is still putting away its last message when the
    interpreter is taken down then aborts the process: all results written, exit code -6. Without
    those references closing waits for the threads.
    """
    if not dist.is_initialized():
        return
    comm.synchronize()  # nobody closes a connection that another process still reads from
    comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()
