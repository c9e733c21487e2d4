"""Classify images with ResNet-18 under cross-entropy.

Testing adds the accuracy of each class and a confusion matrix.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from experiment.library_internals import is_attached
from modules.cifar_resnet import CIFARResNet18
from modules.metrics import Metrics
from modules.two_pass import TwoPassModule


class ImageClassifier(TwoPassModule):
    """Train ResNet-18 under cross-entropy, with top-1 and top-5 accuracy.

    A batch is (images (batch, 3, height, width) float32, labels (batch,) int64). ``test`` also logs the accuracy of
    each class. It draws the confusion matrix to ``confusion_matrix.png`` in the run folder and to every logger that
    accepts pictures.

    Args:
        classes, width: of the network, see :class:`modules.cifar_resnet.CIFARResNet18`.
        label_smoothing: part of the target that is spread evenly over all classes, in [0, 1), only in training.
        channels_last: store images, activations and kernels with the channels innermost in memory, which makes
            convolutions faster. Results differ by rounding.
        compile: compile the network with ``torch.compile``. This takes a minute once and makes every step faster.
        options: of the training step, see :class:`modules.two_pass.TwoPassModule`.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        classes: int = 10,
        width: int = 64,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.network = CIFARResNet18(classes, width)
        self.classes, self.label_smoothing = classes, label_smoothing
        self.class_names = [str(number) for number in range(classes)]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_network = compile
        metrics = {"accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False)}
        if classes > 5:
            metrics["top5_accuracy"] = MulticlassAccuracy(classes, average="micro", top_k=5, validate_args=False)
        self.set_metrics(metrics)
        self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)

    def configure_model(self) -> None:
        """Apply the memory format, and compile the network if requested."""
        super().configure_model()
        self.network.to(memory_format=self.memory_format)
        if self.compile_network:
            self.compile_once(self.network)

    def setup(self, stage: str) -> None:
        """Check that the data has as many classes.

        Raises:
            ValueError: the numbers of classes differ.
        """
        if len(self._names()) != self.classes:
            raise ValueError(
                f"the model has {self.classes} classes, the data {len(self._names())}: set model.classes to the latter"
            )

    def _names(self) -> list[str]:
        return list(getattr(self._data(), "classes", self.class_names))

    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None) if is_attached(self) else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_names"] = [str(name) for name in self._names()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.class_names = checkpoint.get("class_names", self.class_names)

    def _logits(self, images: Tensor) -> Tensor:
        # Images are float32 even if the network has another precision.
        dtype = next(self.network.parameters()).dtype
        logits: Tensor = self.network(images.to(dtype, memory_format=self.memory_format))
        return logits

    def compute_loss(self, batch: tuple[Tensor, Tensor], metrics: Metrics | None) -> Tensor:
        """Return the mean cross-entropy in nats."""
        images, labels = batch
        logits = self._logits(images)
        if metrics is not None:
            scores = logits.detach()
            metrics["accuracy"].update(scores, labels)
            if "top5_accuracy" in metrics:
                metrics["top5_accuracy"].update(scores, labels)
            if metrics is self.test_metrics:
                self.confusion.update(scores, labels)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if self.training else 0.0)

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of each class, and draw the confusion matrix."""
        super().on_test_epoch_end()
        counts = self.confusion.compute()
        self.confusion.reset()
        per_class = counts.diag() / counts.sum(1).clamp(min=1)
        self._log_identical(
            {f"test/accuracy_{name}": value for name, value in zip(self._names(), per_class, strict=True)}
        )
        # A collective, so it must be called on every process. Without a logger there is no run folder.
        folder = self.trainer.log_dir if self.loggers else None
        if self.trainer.is_global_zero and folder is not None:
            picture = Path(folder) / "confusion_matrix.png"
            draw_confusion_matrix(counts.cpu(), self._names(), picture)
            for logger in self.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image("test/confusion_matrix", [str(picture)])
            print(f"confusion matrix: {picture}")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> list[str]:
        """Return one line for each image.

        It has the number or file, the class and its probability, and whether the class is right. Without a Trainer,
        numbers assume that all batches have the size of this one.
        """
        images, labels = batch
        probabilities = self._logits(images).float().softmax(1)
        names, files = self._names(), getattr(self._data(), "images", None)
        loader: Any = self.trainer.predict_dataloaders if is_attached(self) else None
        batch_size = len(images) if loader is None else loader.batch_size
        lines = []
        for i, (label, row) in enumerate(zip(labels.tolist(), probabilities, strict=True)):
            guess = int(row.argmax())
            number = batch_index * batch_size + i
            line = f"{f'image {number}' if files is None else files[number]}: {names[guess]} ({100 * row[guess]:.1f} %)"
            if label >= 0:
                line += ", right" if guess == label else f", wrong, it is {names[label]}"
            lines.append(line)
        return lines


def draw_confusion_matrix(counts: Tensor, names: list[str], path: Path) -> None:
    """Draw a confusion matrix with labels in rows and predictions in columns.

    Args:
        counts: (classes, classes) int64.
        names: of the classes.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 0.55 * len(names), 1.5 + 0.5 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    for row, column in torch.cartesian_prod(*[torch.arange(len(names))] * 2).tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title(f"accuracy {counts.diag().sum() / counts.sum().clamp(min=1):.2%}")
    figure.savefig(path, dpi=120)
