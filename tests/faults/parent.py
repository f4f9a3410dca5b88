"""The pipeline's part towards one stage, without Prefect: `python -m tests.faults.parent FOLDER PROCESSES FROZEN_S`.

Launches the stage as a flow does, turns a signal into an interruption as a flow does, and ends with the stage's exit status.
"""

import signal
import sys
from pathlib import Path
from typing import NoReturn

from flows.launch.attempt import launch
from stages.contract.config import Compute
from stages.store.folders import StageFolder


def main() -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    folder, processes, frozen_s = StageFolder(Path(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    try:
        outcome = launch(folder, Compute(processes=processes, threads=1, frozen_s=frozen_s))
    except KeyboardInterrupt:
        sys.exit(75)
    print(outcome.message, flush=True)
    sys.exit(int(outcome.status))


if __name__ == "__main__":
    main()
