"""The data has every sum once, split as published."""

import pytest
import torch

from datamodules.modular_addition import ModularAdditionData


def examples(loader: object) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, answers = zip(*loader, strict=True)  # type: ignore[call-overload]
    return torch.cat(tokens), torch.cat(answers)


def test_published_split_has_3830_and_8939_pairs_and_eight_steps_an_epoch() -> None:
    data = ModularAdditionData()
    sizes = [len(examples(loader)[0]) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert sizes == [3830, 8939]
    assert [len(batch[0]) for batch in data.train_dataloader()] == [512] * 7 + [246]


@pytest.mark.parametrize("p", [3, 4, 7, 23])
def test_the_two_splits_have_every_pair_once_with_its_answer(p: int) -> None:
    data = ModularAdditionData(p=p, batch_size=5, val_batch_size=6)
    parts = [examples(loader) for loader in (data.train_dataloader(), data.val_dataloader())]
    tokens, answers = (torch.cat(part) for part in zip(*parts, strict=True))
    assert sorted(map(tuple, tokens.tolist())) == [(x, y, p) for x in range(p) for y in range(p)]
    assert all((x + y) % p == answer for (x, y, _), answer in zip(tokens.tolist(), answers.tolist(), strict=True))
    assert len(parts[0][0]) == int(0.3 * p * p)


def test_the_split_follows_from_the_seed() -> None:
    pairs = [ModularAdditionData(p=23, seed=seed).train_pairs for seed in (1, 1, 2)]
    assert torch.equal(pairs[0], pairs[1]) and not torch.equal(pairs[0], pairs[2])


def test_questions_are_asked_in_their_order_and_otherwise_come_from_the_validation_split() -> None:
    tokens, answers = examples(ModularAdditionData(p=7, questions=["3+5", " 6 + 6 = "]).predict_dataloader())
    assert tokens.tolist() == [[3, 5, 7], [6, 6, 7]] and answers.tolist() == [1, 5]
    data = ModularAdditionData(p=7)
    tokens, _ = examples(data.predict_dataloader())
    assert tokens[:, :2].tolist() == data.val_pairs[:10].tolist()


@pytest.mark.parametrize("options", [{"p": 2}, {"p": 7, "train_fraction": 0.0}, {"p": 7, "train_fraction": 1.0}])
def test_options_that_leave_no_data_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[-1]} must"):
        ModularAdditionData(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("question", ["3+7", "3-1", "a+b", "", "-1+2"])
def test_a_question_that_is_no_sum_of_two_numbers_below_p_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match="below p = 7"):
        ModularAdditionData(p=7, questions=[question])
