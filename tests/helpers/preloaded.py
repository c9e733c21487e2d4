"""Import modules in the server that the tests' processes are forked from."""

import gc
import importlib

gc.disable()  # during the imports, whose objects all survive

from tests.helpers.commands import AGA, call  # noqa: E402

MODULES = (
    # What a run imports late: pictures at its end, W&B at its beginning.
    *("analysis.plots", "analysis.run_pictures", "callbacks.flatness_probe", "wandb.proto.wandb_internal_pb2"),
    # The targets of tests.helpers.launching, with the modules of all tasks.
    *("tests.modules.ddp_fit", "tests.modules.sharded_fit", "tests.ars2.sharded_training"),
    *("tests.helpers.resuming", "tests.helpers.wandb_server"),
)
for name in MODULES:
    importlib.import_module(name)
# Lightning and jsonargparse import more with the first command; this one runs nothing.
call("fit", *AGA, "--print_config")
gc.freeze()
gc.enable()
