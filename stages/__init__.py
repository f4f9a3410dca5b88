"""What a run consists of: one module per kind of stage, and the rooms that they are built from. Nothing here knows Prefect."""

from stages.runtime.platform import refuse_native_windows

refuse_native_windows()
