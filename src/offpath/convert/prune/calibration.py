"""Walking through a model block by block, with what its layers are fed after the blocks before were pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import signature
from operator import length_hint
from typing import Any, TypeVar

from torch import Tensor, nn

from offpath.convert.fused_encoders import called_by_encoders
from offpath.convert.prune.inputs import Norms, check_input, fed, rows
from offpath.convert.prune.layer import Layer
from offpath.convert.prune.scores import Progress
from offpath.convert.prune.survey import Survey, block_names

Feed = Callable[[Layer, Tensor], None]
Statistic = TypeVar("Statistic", bound=Norms)


class _Done(BaseException):
    """The layers of a pass have seen all of a batch. No `Exception`, so that the model's code does not catch it."""


def check_calibration(calibration: Any) -> None:
    """Raise `ValueError` for what cannot be iterated over several times, or is itself one batch."""
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise ValueError(
            "expected calibration to be a list or another iterable of model inputs, got a "
            f"{type(calibration).__name__}; put a single batch into a list"
        )
    if isinstance(calibration, Iterator):
        raise ValueError(
            "expected calibration that can be gone through several times, got a "
            f"{type(calibration).__name__}, which is empty after the first; pass list(calibration) or a DataLoader"
        )


class Walk:
    """Passes over the calibration data: `survey` first, then `statistics` of one group of layers after the other."""

    def __init__(self, model: nn.Module, calibration: Iterable[Any], progress: Progress | None) -> None:
        self._model = model
        self._calibration = calibration
        self._progress = progress
        self._batches_done = 0
        self._passes_left = 0

    def survey(self, layers: list[Layer], together: bool) -> tuple[Survey, list[list[Layer]]]:
        """One pass: which layers are called, and the groups that they are pruned in, in the order of the calls.

        A group is a block of the model, with the layers elsewhere that read the same inputs; all layers, if
        `together`. Raises `ValueError` for no batch at all, a batch that is no model input, NaN or infinity at the
        input of a layer, or if no layer is called.
        """
        survey = Survey(layers)

        def note(layer: Layer, x: Tensor) -> None:
            check_input(layer.name, x)
            if x.numel():
                survey.note(layer, x)

        names = dict.fromkeys(layers, "") if together else block_names(self._model, layers)
        self._passes_left = len(set(names.values()))
        self._pass(layers, note, before_batch=survey.next_batch)
        survey.end()
        if not survey.batches:
            raise ValueError("expected at least one batch of calibration data, got none")
        groups: dict[str, list[Layer]] = {}
        for twins in survey.twins(survey.called()):
            groups.setdefault(names[twins[0]], []).extend(twins)
        if not groups:
            raise ValueError(
                "expected the calibration data to go through the layers that are to be pruned, but none of them was "
                "called with any; is it empty, or does the model read their weights without calling them?"
            )
        self._passes_left = len(groups)
        return survey, list(groups.values())

    def statistics(
        self, survey: Survey, group: list[Layer], kind: type[Statistic]
    ) -> Iterator[tuple[list[Layer], Statistic | None]]:
        """One pass: what the layers of `group` are fed now; None for those that are fed nothing any more.

        Layers that read the same inputs come together and share what was counted.
        """
        twins = survey.twins(group)
        counted = {same[0]: kind() for same in twins}

        def count(layer: Layer, x: Tensor) -> None:
            check_input(layer.name, x)
            for piece in rows(layer.module, x) if x.numel() else ():
                counted[layer].add(piece)

        self._passes_left -= 1
        self._pass(list(counted), count, stop_at=survey.after(group))
        for same in twins:
            statistic = counted.pop(same[0])
            yield same, statistic if statistic.count else None

    def _pass(
        self,
        layers: Collection[Layer],
        feed: Feed,
        before_batch: Callable[[], None] = lambda: None,
        stop_at: Layer | None = None,
    ) -> None:
        expected = length_hint(self._calibration)
        for index, batch in enumerate(self._calibration, start=1):
            before_batch()
            with _listening(self._model, layers, feed, stop_at), suppress(_Done):
                _call(self._model, batch)
            self._batches_done += 1
            if self._progress is not None:
                here = max(expected, index)
                self._progress(self._batches_done, self._batches_done + here - index + here * self._passes_left)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        try:
            signature(model.forward).bind(*batch)
        except TypeError as error:
            raise ValueError(
                f"expected batches of calibration data to be the model's arguments, got one of {len(batch)} parts "
                f"({error}); where labels come along, pass calibration=[inputs for inputs, _ in loader]"
            ) from error
        model(*batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        raise ValueError(
            "expected each batch of calibration data to be a Tensor, a tuple of arguments or a mapping of keyword "
            f"arguments, got a {type(batch).__name__}"
        )


@contextmanager
def _listening(model: nn.Module, layers: Collection[Layer], feed: Feed, stop_at: Layer | None) -> Iterator[None]:
    """While it lasts, each call of `layers` is told to `feed`, and a call of `stop_at` ends the model's run."""

    def listener(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _module, args, kwargs: feed(layer, fed(args, kwargs))

    def stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        raise _Done

    heard = {layer.module for layer in (*layers, *([] if stop_at is None else [stop_at]))}
    handles = []
    try:
        if stop_at is not None:
            handles.append(stop_at.module.register_forward_pre_hook(stop))
        for layer in layers:
            handles.append(layer.module.register_forward_pre_hook(listener(layer), with_kwargs=True))
        with called_by_encoders(model, heard):
            yield
    finally:
        for handle in handles:
            handle.remove()
