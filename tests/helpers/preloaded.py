"""Imported by the server that the tests' processes are forked from."""

import tests.helpers.commands
import tests.helpers.resuming
import tests.helpers.wandb_server
from tests.helpers.commands import call

# Lightning and jsonargparse import more with the first command; this one makes nothing.
call("fit", *tests.helpers.commands.AGA, "--print_config")
