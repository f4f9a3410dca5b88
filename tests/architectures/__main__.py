"""`python -m tests.architectures [CLASS …]`: sweep all classes and write the documentation's table, or print what some do."""

import sys
import tempfile
from pathlib import Path

from stages.problems.toy import save_toy_tokenizer
from tests.architectures.build import BLOCKED, classes
from tests.architectures.paths import paths
from tests.architectures.table import TABLE, write


def main(names: list[str]) -> None:
    """Sweep the named classes, or all of them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_toy_tokenizer(Path(folder))
        found = {}
        for name in names or [name for name in classes() if name not in BLOCKED]:
            found[name] = each = paths(name, tokenizer)
            differences = ", ".join(f"{what} {difference:.1e}" for what, difference in each.differences.items())
            print(
                f"{name}: trained {each.train}, sampled {each.sample}; nats: {differences}", *each.refusals.values(), flush=True
            )
    if not names:
        write(found)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main(sys.argv[1:])
