"""What runs first inside the sandbox: it gives itself limits that cannot be taken back, then becomes the judged program.

Its text is handed to the interpreter as `-c`, so it imports the standard library alone, and nothing of this package: little,
and late, because each program pays for it. It holds no expected result: a program that looks through this process finds its
own source and, of the tests, what is asked of it.
"""

import marshal
import os
import resource
import site
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PLAIN_INT = 1 << 63
"""From here on an int travels as hexadecimal: decimal text of any length is refused by the interpreter."""


def main() -> None:
    """Read the job, take the limits, run the program, then answer what is asked of it.

    Arguments: the descriptors from which the job is read, and on which one byte says that the program is about to start.
    """
    job_fd, ready_fd = map(int, sys.argv[1:])
    with open(job_fd, "rb") as file:  # noqa: PTH123 - a file descriptor
        job = marshal.load(file)  # noqa: S302 - the judge's
    with open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
        score.write("1000")  # a machine without memory ends this process, not the training
    if job["uid"] is not None:
        for standard in range(3):
            os.fchown(standard, job["uid"], job["uid"])  # so that the program may open /dev/stdin
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    for name, (soft, hard) in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    os.write(ready_fd, b"r")
    os.closerange(3, 1024)
    if job["first"] and (program_id := os.fork()) != 0:
        reap(program_id)
    asked = job["asked"]
    # Under `__main__` guards stands what reads standard input: asked for its functions, a program is imported.
    program = type(sys)("__main__" if asked is None else "program")
    sys.modules[program.__name__] = program
    sys.argv = ["program.py"]
    # What the interpreter's option -S leaves out, but for the start-up files of installed packages.
    site.setquit()
    sys.path += site.getsitepackages()
    answers = None
    if asked is not None:
        answers = os.dup(1)
        os.dup2(2, 1)
    exec(compile(job["source"], "program.py", "exec"), program.__dict__)  # noqa: S102
    if answers is not None:
        import json

        text = json.dumps([answer(expression, program.__dict__) for expression in asked]).encode()
        while text:
            text = text[os.write(answers, text) :]
        os._exit(0)  # threads of the program would keep the process


def reap(program: int) -> None:
    """Be the namespace's first process until the program ends. It is the program's equal: within its reach, and as limited."""
    while True:
        try:
            process, status = os.wait()
        except KeyboardInterrupt:  # the program's doing
            continue
        if process == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def answer(expression: str, names: "dict[str, Any]") -> "list[Any]":
    """`["value", the encoded value]`, or `["raised", the exception]`."""
    try:
        return ["value", encode(eval(compile(expression, "test", "eval"), names))]  # noqa: S307
    except Exception as error:  # noqa: BLE001 - the program's
        return ["raised", f"{type(error).__name__}: {error}"[:500]]


def encode(value: "Any") -> "Any":
    """Plain data as JSON; anything else as the name of its type, so that no method of the program travels."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -PLAIN_INT < value < PLAIN_INT else {"int": hex(value)}
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple | set | frozenset):
        kind = "tuple" if isinstance(value, tuple) else "set"
        return {kind: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    return {"object": type(value).__name__}


if __name__ == "__main__":
    main()
