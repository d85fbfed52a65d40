"""No call in the repository runs what stands in a file, unpacks an archive to where it says, or builds a command for a
shell.

The source is read, not run: a call that is added is seen in the review, or here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastssl", "pipelines", "benchmarks")

#: what runs or builds whatever its input says, under the last two parts of its name
FORBIDDEN = {
    *(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "cPickle.load",
        "dill.load",
        "dill.loads",
        "cloudpickle.load",
        "cloudpickle.loads",
    ),
    *("joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle", "pd.read_pickle"),
    *(
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "yaml.full_load_all",
        "yaml.unsafe_load_all",
        "yaml.UnsafeLoader",
        "yaml.FullLoader",
        "yaml.Loader",
    ),
    *("jit.load", "hub.load", "package.PackageImporter", "torch.PackageImporter", "hub.load_state_dict_from_url"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "code.interact", "runpy.run_path"),
    *("shutil.unpack_archive", "builtins.eval", "builtins.exec"),
}
#: built-in functions by their bare name
BUILT_IN = {"eval", "exec", "compile", "__import__"}
#: methods that write to where an archive says, whatever the object is called; ``extract`` is looked at by hand
METHODS = {"extractall"}
#: (file, call) that was looked at: why it is harmless
KNOWN: dict[tuple[str, str], str] = {
    ("benchmarks/estimate/gauge.py", "extract"): "a function of its own that measures the extraction of features",
    ("fastssl/weights/source.py", "a model from the network"): "timm reads safetensors, or torch's with weights_only",
}


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "dill", "joblib", "shelve"):
            for name in node.names:
                if name.name in ("load", "loads", "Unpickler", "open"):
                    yield node.lineno, f"from {node.module} import {name.name}"
        if isinstance(node, ast.Attribute) and _name(node) in FORBIDDEN:
            yield node.lineno, _name(node)
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _of_call(node))


def _of_call(call: ast.Call) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    name = _name(call.func)
    last = name.rsplit(".", 1)[-1]
    if isinstance(call.func, ast.Name) and name in BUILT_IN:
        yield name
    if last in METHODS or last == "extract":
        yield last
    if name.endswith("torch.load") and not _is(keywords.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if (
        last in ("load", "fromfile", "memmap")
        and name.split(".")[0] in ("np", "numpy")
        and not _is(keywords.get("allow_pickle", ast.Constant(False)), False)
    ):
        yield "numpy with allow_pickle"
    if name == "yaml.load" and not (len(call.args) == 2 or "Loader" in keywords):
        yield "yaml.load without a loader"
    if name == "yaml.load":
        loader = keywords.get("Loader", call.args[1] if len(call.args) == 2 else None)
        if loader is not None and _name(loader).rsplit(".", 1)[-1] not in ("SafeLoader", "CSafeLoader"):
            yield f"yaml.load with {_name(loader)}"
    if "shell" in keywords and not _is(keywords["shell"], False):
        yield "a command through the shell"
    if last == "safe_globals" and "HARMLESS" not in ast.dump(call):
        yield "safe_globals with something else than HARMLESS"
    if last == "add_safe_globals":
        yield last
    if _is(keywords.get("trust_remote_code"), True) or _is(keywords.get("pretrained"), True):
        yield "a model from the network"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _name(node: ast.expr) -> str:
    """``torch.load`` for ``torch.load`` and ``x.torch.load``: the last two parts."""
    if isinstance(node, ast.Attribute):
        inner = node.value
        owner = inner.attr if isinstance(inner, ast.Attribute) else inner.id if isinstance(inner, ast.Name) else ""
        return f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_in_the_repository_runs_a_file() -> None:
    seen, found = 0, []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            seen += 1
            name = path.relative_to(ROOT).as_posix()
            found += [
                f"{name}:{line}: {what}" for line, what in findings(path.read_text()) if (name, what) not in KNOWN
            ]
    assert seen > 100 and found == []


def test_known_exceptions_are_still_there() -> None:
    for name, what in KNOWN:
        assert what in {found for _, found in findings((ROOT / name).read_text())}


@pytest.mark.parametrize(
    "source",
    [
        *(
            "torch.load(path)",
            "torch.load(path, weights_only=False)",
            "torch.load(path, weights_only=flag)",
            "a.torch.load(x)",
        ),
        *("pickle.load(f)", "import pickle as p\nfrom pickle import loads", "read = pickle.loads", "joblib.load(f)"),
        *(
            "yaml.load(text)",
            "yaml.load(text, Loader=yaml.Loader)",
            "yaml.load(text, yaml.FullLoader)",
            "yaml.unsafe_load(t)",
        ),
        *(
            "np.load(path, allow_pickle=True)",
            "numpy.load(path, allow_pickle=x)",
            "eval(text)",
            "exec(open(p).read())",
            "__import__(name)",
        ),
        *(
            "tar.extractall()",
            "tarfile.open(p).extract(member)",
            "zipfile.ZipFile(p).extractall(to)",
            "shutil.unpack_archive(p)",
        ),
        *(
            "os.system(c)",
            "subprocess.run(c, shell=True)",
            "torch.jit.load(p)",
            "torch.hub.load(r, m)",
            "marshal.loads(b)",
        ),
        *(
            "torch.serialization.add_safe_globals([x])",
            "torch.serialization.safe_globals([os.system])",
            "timm.create_model(a, pretrained=True)",
        ),
    ],
)
def test_what_must_be_seen_is_seen(source: str) -> None:
    assert list(findings(source)), source


@pytest.mark.parametrize(
    "source",
    [
        *(
            "torch.load(path, weights_only=True)",
            "yaml.safe_load(t)",
            "yaml.load(t, Loader=yaml.SafeLoader)",
            "np.load(p)",
            "network.eval()",
        ),
        *(
            "json.loads(t)",
            "re.compile(x)",
            "torch.compile(net)",
            "subprocess.run([a])",
            "timm.create_model(a, pretrained=False)",
            "np.fromfile(p)",
        ),
    ],
)
def test_what_is_harmless_is_not(source: str) -> None:
    assert not list(findings(source)), source
