"""Start-up imports only the listed packages.

Each test measures it in a separate process.
"""

import json
from pathlib import Path

from tests.helpers.commands import AGA, TINY, fresh_python

# Prints the installed packages whose modules were loaded, by top-level name.
PRINT_PACKAGES = """
import json, sys, sysconfig
places = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
names = {name.partition(".")[0] for name, file in files.items() if file.startswith(places)}
# Not a package: how an installer may make a checkout importable, under a name with the version in it.
print(json.dumps(sorted(name for name in names if not name.startswith("__editable__"))))
"""
RUN = """
import os, runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, os.getcwd())
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as leaving:
    assert leaving.code == 0, leaving.code
"""

# Packages that `import torch` loads, which differs between machines and is not under our control.
WITH_TORCH = {
    *("torch", "torchgen", "functorch", "typing_extensions", "numpy", "sympy", "mpmath", "networkx", "jinja2"),
    *("markupsafe", "fsspec", "filelock", "triton", "nvidia", "cuda", "optree", "tqdm", "dill", "psutil", "PIL"),
    *("yaml", "regex", "attr", "attrs", "packaging", "setuptools", "_distutils_hack", "expecttest", "pkg_resources"),
    *("opt_einsum", "ml_dtypes", "pytz", "dateutil", "six", "colorama"),
}
# What a grokking run may import besides.
WITH_A_RUN = {
    *("lightning", "lightning_utilities", "torchmetrics", "rich", "pygments", "markdown_it", "mdurl"),
    *("jsonargparse", "docstring_parser", "typeshed_client", "importlib_resources", "aiohttp", "requests"),
}
NEVER = {
    *("transformers", "datasets", "torchvision", "torchaudio", "wandb", "matplotlib", "pandas", "scipy", "sklearn"),
    *("tensorboard", "tokenizers", "pyarrow", "pytorch_lightning", "onnx", "ipywidgets", "IPython"),
}


def packages_after(code: str, home: Path, *arguments: str) -> set[str]:
    result = fresh_python("-c", code + PRINT_PACKAGES, *arguments, home=home, timeout=120)
    assert result.code == 0, result.err
    return set(json.loads(result.out.splitlines()[-1]))


def test_a_run_imports_no_heavy_package_and_nothing_that_is_not_named(tmp_path: Path) -> None:
    """Run a trial of one step, from start to summary.

    A trial is not drawn at its end.
    """
    # Without --wandb: where no key is configured, the default must not import it either.
    tiny = [*TINY[: TINY.index("--wandb")], "--trainer.max_steps", "1"]
    tiny += ["--sweep.name", "search", "--sweep.optimizer", "aga", "--sweep.trial", "0"]
    found = packages_after(RUN, tmp_path, "fit", *AGA, *tiny, "--runs", str(tmp_path / "runs"))
    assert {"torch", "lightning", "torchmetrics"} <= found
    assert found & NEVER == set()
    assert found - WITH_TORCH - WITH_A_RUN == set()


def test_the_optimizer_imports_only_torch(tmp_path: Path) -> None:
    code = f"import torch\n{PRINT_PACKAGES}\nsys.path.insert(0, ''); import ars2\n{PRINT_PACKAGES}"
    result = fresh_python("-c", code, home=tmp_path)
    assert result.code == 0, result.err
    torch_alone, with_optimizer = (set(json.loads(line)) for line in result.out.splitlines()[-2:])
    assert with_optimizer - torch_alone - {"ars2"} == set()
