from callbacks.module_protocol import TrainedModule
from tests.callbacks.fits import module


def test_a_task_module_has_every_member_that_callbacks_need() -> None:
    members = {name for name in {**vars(TrainedModule), **TrainedModule.__annotations__} if not name.startswith("_")}
    assert {"network", "between_steps", "batch_size"} < members
    model = module()
    assert [name for name in sorted(members) if not hasattr(model, name)] == []
