"""Observers of calipers in the form that llmcompressor 0.11 and later call.

Importing this module imports llmcompressor.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from compressed_tensors.distributed import is_distributed
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.observers import IMatrixMSEObserver as PeerIMatrixObserver
from llmcompressor.observers import Observer as PeerObserver
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calipers.errors import MissingDataError
from calipers.integrations.llmcompressor.options import options_for
from calipers.integrations.llmcompressor.session import current_loss_mask, name_of
from calipers.observers import Observer
from calipers.observers.hooks import first_tensor

__all__ = ["Adapter", "adapt"]

#: The hook that feeds inputs to an observer of each module. A recipe that failed half way leaves
#: its hooks behind; the observer of the next recipe removes them here.
_collecting: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class Adapter(PeerObserver):
    """An observer of llmcompressor whose work is done by one of calipers, its `inner`.

    The range that `inner` finds is set as `min_vals` and `max_vals`. What llmcompressor derives
    from those (scales, fused global scales) and when it deletes them is left to its own base class.
    """

    calipers_class: ClassVar[type[Observer]]
    inner: Observer

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any) -> None:
        options = {**options_for(self.calipers_class, args), **observer_kwargs}
        # llmcompressor writes options into the arguments it is given: into a copy, here.
        args = args.model_copy(update={"observer_kwargs": options})
        super().__init__(base_name=base_name, args=args)
        # Past nn.Module, so that no walk over the model's modules comes upon it.
        object.__setattr__(self, "inner", self.calipers_class(base_name, args))
        self._module_ref: weakref.ref[Any] | None = None
        self._collects: RemovableHandle | None = None

    # -- observing ---------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, observed: Tensor) -> Adapter:
        """Take in a value as it is, so that no layout is copied; a weight is measured once."""
        if observed.numel() and not (self.is_weight_obs and self.has_statistics):
            try:
                self.inner.observe(self._counted(observed))
            except ValueError:
                if not self._wants_inputs or self.inner.has_data:
                    raise
                raise self._missing_tokens() from None
            self._set_range()
            self.fusion_handler.get_fused_statistics()
        return self

    @torch.no_grad()
    def update_statistics_from_observed(self, observed: Tensor) -> None:
        """Take in a value in the canonical layout `(num_observations, *qparam_shape, group_size)`.

        For code that calls this hook itself: `forward` above does without it.
        """
        self.inner.get_min_max(observed)
        self._set_range()

    def _counted(self, observed: Tensor) -> Tensor:
        """The tokens of an activation that count, where the recipe runs with `use_loss_mask`."""
        mask = None if self.is_weight_obs else current_loss_mask()
        if mask is None:
            return observed
        heads = self.base_name not in ("input", "output") and observed.dim() == 4
        by_token = observed.transpose(1, 2) if heads else observed
        if not mask.fits(by_token.shape):
            return observed
        chosen = mask.select(by_token)
        return chosen.transpose(0, 1) if heads else chosen

    def _missing_tokens(self) -> MissingDataError:
        """The error that names the module without tokens, and what llmcompressor offers then."""
        module = None if self._module_ref is None else self._module_ref()
        name = self.inner.name if module is None else name_of(module, search=True)
        return MissingDataError(
            f"{name}: no token reached it, and {type(self.inner).__name__} measures its weight by "
            "its inputs. Is it an expert of a mixture? Run oneshot with "
            "moe_calibrate_all_experts=True (the default, for models whose experts llmcompressor "
            "knows), give it more data, or put it on the recipe's ignore list"
        )

    def _set_range(self) -> None:
        if self.inner.gives_range:
            found = self.inner.get_range()
        else:
            scale = self.inner.get_qparams()[0]
            # what llmcompressor looks at to see that there are statistics
            found = None if scale is None else (-scale.abs(), scale.abs())
        if found is not None:
            self.min_vals, self.max_vals = found

    @torch.no_grad()
    def get_qparams(self) -> dict[str, Tensor | None]:
        """Scale, zero point and global scale, of which the scale has the dtype of the values."""
        dtype = self.inner.observed_dtype
        if not self.inner.gives_range:
            own = self.inner.get_qparams()
            self.delete_statistics()
            return {"scale": own[0], "zero_point": own[1], "global_scale": None}
        qparams: dict[str, Tensor | None] = super().get_qparams()
        scale = qparams["scale"]
        if scale is not None and dtype is not None and scale.dtype == torch.float64:
            # The range of an observer that finds scales is float64: see `range_of_qparams`.
            qparams["scale"] = scale.to(dtype)
        return qparams

    def delete_statistics(self, check_fused: bool = True) -> None:
        """Delete the range, once every fused observer is done with it.

        What the module's inputs have taught stays until `detach`: a module that is observed again,
        such as one that several layers share, is then measured by all it has seen.
        """
        super().delete_statistics(check_fused)
        if not check_fused:
            taught = _statistics_of_inputs(self.inner) if self._wants_inputs else {}
            self.inner.reset()
            self.inner.load_state({**self.inner.state(), **taught})

    # -- inputs of the module ----------------------------------------------------------------

    @property
    def _wants_inputs(self) -> bool:
        return self.is_weight_obs and self.inner.needs_data

    def attach(self, module: nn.Module) -> None:
        """Collect the inputs of `module` where the observer of its weight needs them."""
        self.detach(module)
        self._module_ref = weakref.ref(module)
        self.inner.name = f"{name_of(module)}.{self.base_name}"
        left_behind = _collecting.pop(module, None)
        if left_behind is not None:
            left_behind.remove()
        if self._wants_inputs and hasattr(module, "in_features"):
            # Its hooks stay silent where llmcompressor disables hooks, as in a second pass.
            self._collects = HooksMixin().register_hook(
                module, self._see_inputs, "forward_pre", with_kwargs=True
            )
            _collecting[module] = self._collects

    def detach(self, module: nn.Module) -> None:
        """Stop collecting."""
        if self._collects is not None:
            self._collects.remove()
            self._collects = None
            _collecting.pop(module, None)

    def _see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = first_tensor((*args, *kwargs.values()))
        if inputs is None or not inputs.numel():
            return
        mask = current_loss_mask()
        if mask is not None and mask.fits(inputs.shape):
            inputs = mask.select(inputs.detach())
        self.inner.observe_input(inputs)

    # -- ranks -------------------------------------------------------------------------------

    def sync_activation_stats(self) -> list[dist.Work]:
        """Bring together what the ranks saw; every rank takes part, whether it saw anything or not.

        Weights are the same on all ranks: of their observers only those that need data take part.
        A rank that saw nothing gives an empty state, which changes no merge. States are merged in
        the order of ranks, so that all come to the same numbers.

        Returns:
            An empty list: nothing is left to wait for.
        """
        if not is_distributed() or not (self._wants_inputs or not self.is_weight_obs):
            return []
        device = self._device()
        states: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(states, {k: v.cpu() for k, v in self.inner.state().items()})
        measured = self.has_statistics
        self.inner.reset()
        for state in states:
            rank = type(self.inner)(self.base_name, self.inner.args)
            rank.load_state({name: value.to(device) for name, value in state.items()})
            self.inner.merge(rank)
        module = None if self._module_ref is None else self._module_ref()
        if self.is_weight_obs and measured and module is not None:
            # GPTQ has measured the weight by this rank's inputs alone.
            self.inner.observe(module.weight)
        self._set_range()
        return []

    def _device(self) -> torch.device:
        """Where merged statistics go: to this rank's own, or to the module's parameters."""
        own = next((value for value in self.inner.state().values() if value.dim()), None)
        if own is None and self._module_ref is not None:
            own = next(iter(getattr(self._module_ref(), "parameters", list)()), None)
        return torch.device("cpu") if own is None or own.is_meta else own.device


class IMatrixAdapter(Adapter):
    """In place of llmcompressor's own imatrix observers: weighs where those weigh.

    Under the strategies tensor and block those weigh all errors alike; in the canonical layout, so
    do ours. `_imatrix_sum`, `_imatrix_count` and `_imatrix_hook` show and set what `inner` holds.
    """

    _stats_attrs: ClassVar[list[str]] = ["min_vals", "max_vals"]
    _used = False

    def forward(self, observed: Tensor) -> IMatrixAdapter:
        """Take in a value in the canonical layout."""
        return super(Adapter, self).forward(observed)  # type: ignore[no-any-return]

    def update_statistics_from_observed(self, observed: Tensor) -> None:
        """Search with the errors weighed by E[x^2]; with `strict`, inputs that do not fit raise."""
        self._used = False
        if self.strict:
            self._get_validated_importance(observed)
        super().update_statistics_from_observed(observed)

    def delete_statistics(self, check_fused: bool = True) -> None:
        """As `Adapter`; sums of inputs no longer show after that, as with llmcompressor."""
        super().delete_statistics(check_fused)
        self._used = self._used or not check_fused

    def _see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._used = False
        super()._see_inputs(module, args, kwargs)

    @property
    def _imatrix_hook(self) -> RemovableHandle | None:
        return self._collects

    @_imatrix_hook.setter
    def _imatrix_hook(self, hook: None) -> None:
        """Only None is ever set, by llmcompressor's constructor."""

    @property
    def _imatrix_sum(self) -> Tensor | None:
        self._need_unused()
        found = self.inner.input_square_sum
        module = None if self._module_ref is None else self._module_ref()
        if found is None and module is not None and self._collects is not None:
            found = torch.zeros(
                module.in_features, dtype=torch.float32, device=module.weight.device
            )
        return None if found is None else found.float()

    @_imatrix_sum.setter
    def _imatrix_sum(self, value: Tensor | None) -> None:
        if "inner" in self.__dict__:
            self.inner.moments.input_square_sum = None if value is None else value.double()

    @property
    def _imatrix_count(self) -> Tensor:
        self._need_unused()
        shown = self._imatrix_sum
        device = torch.device("cpu") if shown is None else shown.device
        return torch.tensor(self.inner.num_input_tokens, dtype=torch.int64, device=device)

    @_imatrix_count.setter
    def _imatrix_count(self, value: Tensor) -> None:
        if "inner" in self.__dict__:
            self.inner.moments.num_input_tokens = int(value)

    def _need_unused(self) -> None:
        if self._used:
            raise AttributeError("the sums of inputs were used up by get_qparams")


def _statistics_of_inputs(inner: Observer) -> dict[str, Tensor]:
    """The statistics that come from the inputs of a weight's module, not from the weight."""
    measured = {*inner.range_names, *inner.global_range_names}
    measured |= {"num_batches", "num_global_batches", "num_nonfinite", "observed_dtype"}
    return {name: value for name, value in inner.state().items() if name not in measured}


@functools.cache
def adapt(cls: type[Observer], original: type[PeerObserver] = PeerObserver) -> type[Adapter]:
    """The class that offers an observer of calipers to llmcompressor.

    Its instances are instances of `original` too, the observer whose place it takes there.
    """
    adapter = IMatrixAdapter if issubclass(original, PeerIMatrixObserver) else Adapter
    members = {"calipers_class": cls, "__doc__": cls.__doc__, "__module__": __name__}
    return type(f"Calipers{cls.__name__}", (adapter, original), members)
