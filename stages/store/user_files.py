"""The user's files that decide a stage's result, with their digests: what of them goes into the fingerprint.

Data, models and lm-eval tasks by the content of file or folder, reward functions by the files that their import reads
(stages/store/user_code.py). Names count only relative to each other: no absolute path is part of a digest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.contract.config import StageConfig, external_files, user_functions
from stages.contract.errors import UserError
from stages.store.files import digest_file, digest_json, digest_path
from stages.store.manifest import InputRecord
from stages.store.user_code import file_name, module_files


def user_file_inputs(config: StageConfig, folders: Sequence[str], *, data: bool = True) -> dict[str, InputRecord]:
    """Role -> digest, path and, of settings and code, the digest of each file.

    `folders`: the code folders, in which modules of the user's are searched. `data`: with data and models.

    Raises UserError for a file that cannot be read, and for a module that is missing, is not Python, or is hidden by an
    installed one.
    """
    inputs: dict[str, InputRecord] = {}
    for role, (path, marker) in external_files(config).items():
        if not (data or marker.settings):
            continue
        where = f"{role}: {path}"
        try:
            files = {}
            if marker.settings:
                files = {name: digest_path(part) for name, part in {path.name: path, **marker.parts(path, folders)}.items()}
            # One file alone: the digest of its content, as it ever was.
            digest = digest_json(files) if len(files) > 1 else digest_path(path)
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", where=where) from error
        inputs[role] = InputRecord(digest=digest, path=str(path.absolute()), files=files)
    return inputs | function_inputs(config, folders)


def function_inputs(config: StageConfig, folders: Sequence[str]) -> dict[str, InputRecord]:
    """The same for the functions that the configuration names; nothing for those of installed packages."""
    inputs: dict[str, InputRecord] = {}
    for role, text in user_functions(config).items():
        module = text.partition(":")[0]
        if modules := module_files(module, folders, where=role):
            files = _digests(modules, role)
            path = modules.get(module, next(iter(modules.values())))
            inputs[role] = InputRecord(digest=digest_json(files), path=str(path), files=files)
    return inputs


def check_user_files(config: StageConfig, inputs: Mapping[str, InputRecord], folders: Sequence[str]) -> None:
    """Compare the user's code and settings on this machine with those that the stage was prepared with.

    Raises UserError when one is missing here or has another content: the result would not be that of the fingerprint.
    """
    prepared = {role: item for role, item in inputs.items() if item.files}
    if not prepared:
        return
    here = user_file_inputs(config, folders, data=False)
    for role, item in prepared.items():
        if role not in here:
            raise UserError(f"`{Path(item.path).name}` is not in {', '.join(folders)}", where=role, mend="copy it there")
        if here[role].digest != item.digest:
            what = f"{', '.join(changed_files(item, here[role]))} is not what the stage was prepared with"
            mend = "copy the same files to this machine, or start again with `r1 run`"
            raise UserError(what, where=f"{role}: {here[role].path}", mend=mend)


def changed_files(before: InputRecord, now: InputRecord) -> list[str]:
    """Names of the files of which two records of one role differ, sorted; that of the path where no files are recorded."""
    if not (before.files or now.files):
        return [Path(now.path).name]
    names = before.files.keys() | now.files.keys()
    return sorted(name for name in names if before.files.get(name) != now.files.get(name))


def _digests(modules: Mapping[str, Path], role: str) -> dict[str, str]:
    try:
        return {file_name(name, path): digest_file(path) for name, path in modules.items()}
    except OSError as error:
        raise UserError(f"cannot be read ({error})", where=role) from error
