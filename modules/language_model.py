"""Train language models, which predict each token from those before it.

The network is Qwen3 (Yang et al. 2025).
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from experiment.library_internals import is_attached
from modules.chunked_cross_entropy import Pass, chunked_cross_entropy
from modules.head_projections import split_heads
from modules.metrics import BitsPerByte, Metrics, Perplexity, WordPerplexity
from modules.sampling import continuation
from modules.two_pass import TwoPassModule


class LanguageModel(TwoPassModule):
    """Train transformers' Qwen3 without dropout on rows of tokens.

    The loss is the mean cross-entropy of all tokens after the first of a row. A batch is (rows (batch, tokens + 1),),
    of any integer dtype. Loss and perplexity are per token; on a complete text also per word and per byte. Attention is
    torch's ``scaled_dot_product_attention``.

    Args:
        vocabulary: number of tokens and of logits.
        context: largest number of tokens before a predicted one.
        layers, width: number of blocks, and width of the residual stream.
        heads, key_value_heads, head_dim: of the attention. ``key_value_heads`` divides ``heads``.
        mlp_width: of the MLP's hidden layer.
        rope_theta: base of the rotary position embedding.
        tied_embeddings: whether embedding and unembedding share one parameter.
        projections: shape of the query, key and value weights. ``"whole"`` is one matrix (heads * head_dim, width)
            each. ``"per_head"`` is a stack (heads, head_dim, width), in which an optimizer of matrices treats each head
            separately.
        compile: compile the network with ``torch.compile`` before the first step. Sampling runs without it, since the
            length of a text changes with every token.
        temperature, top_k, sample_tokens, sample_seed: of continuations. Logits are divided by the temperature (0
            selects the likeliest token), ``top_k`` limits sampling to the likeliest tokens (``None`` for all), then the
            number of tokens and the seed.
        second_loss: loss of a second pass. ``"same"`` is that of the first pass. ``"functional"`` is the sum of the
            logits times the gradient with respect to the logits of the first pass (Functional-SAM,
            https://arxiv.org/abs/2502.02407). For each batch that a second pass may repeat, the first pass then stores
            the last hidden states, and for each window a copy of the unembedding.
        options: of the training step, see :class:`modules.two_pass.TwoPassModule`.

    Raises:
        ValueError: a size below 1, ``key_value_heads`` that does not divide ``heads``, an odd ``head_dim``, or a
            sampling option out of its range.
    """

    uses_parameters = ("predict_step", "continue_text")
    unit = "tokens"
    same_units = True
    network: Qwen3ForCausalLM

    def __init__(
        self,
        vocabulary: int = 40_479,
        context: int = 255,
        layers: int = 3,
        width: int = 512,
        heads: int = 4,
        key_value_heads: int = 4,
        head_dim: int = 128,
        mlp_width: int = 2048,
        rope_theta: float = 10_000.0,
        tied_embeddings: bool = True,
        projections: Literal["whole", "per_head"] = "whole",
        compile: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        sample_tokens: int = 40,
        sample_seed: int = 0,
        second_loss: Literal["same", "functional"] = "same",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        sizes = {"vocabulary": vocabulary, "context": context, "layers": layers, "width": width, "heads": heads}
        sizes |= {"key_value_heads": key_value_heads, "head_dim": head_dim, "mlp_width": mlp_width}
        sizes |= {"sample_tokens": sample_tokens, "top_k": 1 if top_k is None else top_k}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if heads % key_value_heads:
            raise ValueError(f"key_value_heads must divide heads, got {key_value_heads} and {heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, as rotary positions turn pairs of numbers, got {head_dim}")
        if second_loss not in ("same", "functional"):
            raise ValueError(f"second_loss must be 'same' or 'functional', got {second_loss!r}")
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        self.vocabulary, self.context, self.compile_network = vocabulary, context, compile
        self.temperature, self.top_k = temperature, top_k
        self.sample_tokens, self.sample_seed = sample_tokens, sample_seed
        self.second_loss = second_loss
        self._first_passes: list[Pass] = []  # of the open window, for a functional second pass
        self.network = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocabulary,
                max_position_embeddings=context,
                num_hidden_layers=layers,
                hidden_size=width,
                num_attention_heads=heads,
                num_key_value_heads=key_value_heads,
                head_dim=head_dim,
                intermediate_size=mlp_width,
                rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
                tie_word_embeddings=tied_embeddings,
                attention_dropout=0.0,
                use_cache=False,
                attn_implementation="sdpa",  # type: ignore[call-arg]
            )
        )
        if projections == "per_head":
            split_heads(self.network)
        self.set_metrics({"perplexity": Perplexity()})
        self.tokenizer: Any = None  # a tokenizers.Tokenizer, set if no data module provides one

    def configure_model(self) -> None:
        """Shard or compile the network if requested.

        Raises:
            ValueError: as :meth:`modules.two_pass.TwoPassModule.configure_model`.
        """
        super().configure_model()
        if self.compile_network:
            self.compile_once(self.network.model)

    def setup(self, stage: str) -> None:
        """Check that the data fits the network.

        If the data has complete texts, their metrics are added for splits whose batches the trainer does not limit.

        Raises:
            ValueError: vocabulary or context of the data differ.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        for name in ("vocabulary", "context"):
            expected, found = getattr(self, name), getattr(data, name)
            if expected != found:
                raise ValueError(
                    f"the model has {name} {expected}, the data {name} {found}: set model.{name} and"
                    f" data.{name} to the same value"
                )
        if data.protocol == "contiguous":
            sizes = data.description()["splits"]
            for metrics, split, limit in (
                (self.val_metrics, "validation", self.trainer.limit_val_batches),
                (self.test_metrics, "test", self.trainer.limit_test_batches),
            ):
                if isinstance(limit, int) or limit < 1:  # 1 is one batch, and 1.0 is all of them
                    continue
                tokens = sizes[split]["predicted_tokens"]
                metrics["word_perplexity"] = WordPerplexity(tokens, sizes[split]["words"])
                metrics["bits_per_byte"] = BitsPerByte(tokens, sizes[split]["utf8_bytes"])

    def batch_size(self, batch: tuple[Tensor]) -> int:
        """Return the number of predicted tokens."""
        (rows,) = batch
        return rows[:, 1:].numel()

    def compute_loss(self, batch: tuple[Tensor], metrics: Metrics | None) -> Tensor:
        """Return the mean cross-entropy in nats per token, or the loss of a functional second pass."""
        (rows,) = batch
        # No mask is needed, since the attention is causal. Without this entry transformers would search the positions
        # for packed texts, which synchronises with the device in every pass.
        mask: Any = {"full_attention": None}
        model = self.network.model
        output = model(input_ids=rows[:, :-1].long(), attention_mask=mask, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)
        unembedding: Any = self.network.get_output_embeddings()
        first = self._first_pass(hidden, unembedding.weight, metrics) if self.second_loss == "functional" else None
        loss = chunked_cross_entropy(hidden, unembedding.weight, rows[:, 1:].flatten(), first=first)
        if metrics is not None:
            for name, metric in metrics.items():
                if name != "loss":
                    metric.update(loss.detach(), rows[:, 1:].numel())
        return loss

    def _first_pass(self, hidden: Tensor, weight: Tensor, metrics: Metrics | None) -> Pass | None:
        """Return the first pass of the batch in a second pass, else store it if needed.

        A probe has no metrics and an evaluation has others, so neither is stored.
        """
        if self._is_second_pass:
            if not self._first_passes:
                raise RuntimeError(
                    "second_loss functional needs the first pass of the batch, which was not stored: pass the metrics"
                    " that compute_loss() receives on to LanguageModel.compute_loss(), once for each batch"
                )
            return self._first_passes.pop(0)
        if metrics is self.train_metrics and self._window and self._window[-1] is not None:
            del self._first_passes[len(self._window) - 1 :]  # of a window that training left open
            # Copied once for each window, because perturb() moves the parameter in place.
            copy = self._first_passes[0][1] if self._first_passes else weight.detach().clone()
            self._first_passes.append((hidden.detach(), copy))
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_index)
        if self.between_steps:
            self._first_passes.clear()  # those of a step without a second pass need memory

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the tokenizer from the checkpoint, if no data module provides one.

        The data's part of the checkpoint contains it.
        """
        super().on_load_checkpoint(checkpoint)
        if is_attached(self):
            return
        from tokenizers import Tokenizer

        saved = [part["tokenizer"] for part in checkpoint.values() if isinstance(part, dict) and "tokenizer" in part]
        self.tokenizer = Tokenizer.from_str(saved[0]) if saved else None

    def continue_text(self, tokens: Tensor) -> str:
        """Return the text of ``tokens`` (1, tokens) and a sampled continuation.

        Raises:
            ValueError: the module was loaded without data from a checkpoint without a tokenizer.
        """
        data: Any = getattr(self.trainer, "datamodule", None) if is_attached(self) else None
        tokenizer = self.tokenizer if data is None else data.tokens.tokenizer
        if tokenizer is None:
            raise ValueError(
                "the checkpoint has no tokenizer, since it is too old: set the tokenizer attribute of the module"
            )
        with torch.compiler.set_stance("force_eager") if self.compile_network else nullcontext():
            drawn = continuation(
                self.network, tokens, self.sample_tokens, self.context, self.temperature, self.top_k, self.sample_seed
            )
        text: str = tokenizer.decode([*tokens[0].tolist(), *drawn.tolist()], skip_special_tokens=False)
        return text

    def predict_step(self, batch: tuple[Tensor], batch_index: int) -> list[str]:
        """Return the prompt with its continuation."""
        return [self.continue_text(batch[0])]
