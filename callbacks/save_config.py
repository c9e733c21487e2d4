"""Beside a run's config: the digest of the protocol under which its numbers were made."""

import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from callbacks.lookup import folder_of
from run_identity import RunIdentity


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` as Lightning does, and ``protocol.yaml``: a digest and the options that it is made of.

    The digest follows from the config; it is kept so that an edited config is noticed.
    """

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``protocol.yaml`` to the run folder; called on the first process alone."""
        identity = RunIdentity(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
        content = {"digest": identity.protocol_digest, **identity.protocol}
        folder = folder_of(trainer)
        assert folder is not None  # else Lightning would have refused to save the config
        (folder / "protocol.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
