"""What can be wrong with a checkpoint, and what a failed write means for those before it."""

from __future__ import annotations

import errno

_CURES = {
    errno.ENOSPC: "free space there, or keep fewer checkpoints",
    errno.EDQUOT: "the quota is used up: free space there, or keep fewer checkpoints",
    errno.EACCES: "let this user write there, or choose another folder with run.root_dir",
    errno.EPERM: "let this user write there, or choose another folder with run.root_dir",
    errno.EROFS: "it is mounted read-only: choose another folder with run.root_dir",
    errno.EIO: "the disk or the network mount reports a fault: check it, or choose another folder "
    "with run.root_dir",
}


class BrokenCheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or not one; the message names the file."""


def failed_write(error: Exception, place: str) -> OSError:
    """The error of a checkpoint that could not be written, with what to do about it.

    Args:
        error: of the operation that failed, or of the library that speaks to a store.
        place: path or URL of the checkpoint.

    Returns:
        An error with the same errno, if there was one.
    """
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    cure = _CURES.get(number or 0, "check the folder or the store")
    told = OSError(
        f"the checkpoint {place} could not be written: {reason}. The checkpoints before it are as "
        f"they were; {cure}"
    )
    told.errno = number
    return told
