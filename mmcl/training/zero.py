"""DeepSpeed's ZeRO, stages 1 and 2: weights whole on each rank, optimizer states (and gradients) split over them.

Of DeepSpeed only the splitting is used. Forwards, precision, the decision on a step, schedules and checkpoints stay the
run's own, so a checkpoint is that of a run without it and goes on with and without it, on any number of processes.

Source: Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), section 5.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmcl.distributed import Comm
from mmcl.recipe import TrainOptions
from mmcl.types import ConfigError

BUCKET_NUMBERS = 50_000_000
"""of gradients that are exchanged at once; each rank holds memory for so many, 4 bytes each"""


class ZeroOptimizer(Optimizer):
    """An optimizer that works on its rank's part of each parameter group, and tells the others what came of it.

    Every method is called by all ranks.
    """

    def __init__(self, step: nn.Module, optimizer: Optimizer, stage: int, options: TrainOptions) -> None:
        """Takes over ``optimizer``, one that treats each number by itself, and the weights of ``step`` that it moves.

        Args:
            step: what holds the weights, fp32, on the device of the run.
            optimizer: as :func:`~mmcl.training.optim.build_optimizer` makes it.
            stage: 1, or 2, which splits gradients too.
            options: rows, how many backwards make a step, at which norm gradients are clipped.

        Raises:
            ConfigError: DeepSpeed is not installed.
        """
        try:
            import deepspeed
            import deepspeed.ops
        except ImportError:
            raise ConfigError("the launcher says DeepSpeed, which is missing: pip install 'mmcl[deepspeed]'") from None
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # no extension of it is used; else it would look for compilers, and on CPUs compile one at each first start
        deepspeed.ops.__compatible_ops__ = {}
        self.comm = Comm.current()
        self._learning = [list(group["params"]) for group in optimizer.param_groups]
        single = [p for p in step.parameters() if p.ndim == 0]
        for parameter in single:  # it cannot send numbers without an axis at its start, and skips what is marked so
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
        self._engine, *_ = deepspeed.initialize(
            model=step,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": options.global_batch // self.comm.world_size,
                "gradient_accumulation_steps": options.accumulate,
                "gradient_clipping": options.optimizer.clip_norm or 0.0,
                "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET_NUMBERS},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": None,
            },
        )
        for parameter in single:
            del parameter.ds_optim_param  # type: ignore[attr-defined]
        self._zero = self._engine.optimizer
        self._inner = optimizer
        self._backwards = 0
        self.defaults = optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups as they were given, but that each holds one tensor: this rank's part of all its parameters."""
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """Of this rank's parts."""
        return self._inner.state

    def backward(self, loss: Tensor, parts: int) -> None:
        """One of ``parts`` backwards of a step; after the last, this rank has its part of the averaged gradients."""
        self._backwards += 1
        self._engine.set_gradient_accumulation_boundary(self._backwards == parts)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm(self, *, whole: bool) -> Tensor:
        """Of all gradients together, before clipping; infinite where one is not finite. Equal on all ranks.

        ``whole``, and where it is infinite: whole averaged gradients then lie in ``parameter.grad``, to be looked at.
        """
        from deepspeed.utils import safe_get_full_grad

        norm: Tensor = self._zero.scaled_global_norm().float()
        if whole or not bool(norm.isfinite()):
            for parameter in [p for group in self._learning for p in group]:
                parameter.grad = safe_get_full_grad(parameter)
        return norm

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clips and steps on the gradients of the last backward, which are finite."""
        if closure is not None:
            raise ValueError("ZeroOptimizer takes no closure")
        self._zero.refresh_fp32_params()  # of what was loaded, or changed in place: it steps on a copy of its own
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, taken or not."""
        self._backwards = 0
        # as it does itself where it takes no step
        for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in kept:
                kept[group] = None
        self._zero.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer that was given, before its states were split: on the host, on rank 0; others get no
        states.
        """
        found = self._inner.state_dict()
        states: dict[int, dict[str, Any]] = {}
        groups, first = [], 0
        for number, group in enumerate(found["param_groups"]):
            places = self._places(number)
            for key, value in found["state"].get(number, {}).items():
                whole = self.comm.gather_by_rank(value) if _is_split(value) else value
                if self.comm.rank == 0:
                    whole = whole.cpu() if isinstance(whole, Tensor) else whole
                    for index, (p, at) in enumerate(places, first):
                        own = whole[at : at + p.numel()].view_as(p) if _is_split(value) else whole
                        states.setdefault(index, {})[key] = own
            groups.append({**group, "params": list(range(first, first + len(places)))})
            first += len(places)
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up a state of the optimizer that was given; every rank takes its part of it.

        Raises:
            ValueError: it is of other parameters.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(parameters) for parameters in self._learning]:
            raise ValueError("the optimizer's groups are of other parameters")
        states: dict[int, dict[str, Any]] = {}
        for number, group in enumerate(saved):
            of = [state_dict["state"].get(index, {}) for index in group["params"]]
            if not of[0]:
                continue
            states[number] = dict(of[0])  # what all parameters have in common, such as the count of steps
            for key in [key for key, value in of[0].items() if isinstance(value, Tensor) and key != "step"]:
                whole = torch.zeros_like(self._zero.bit16_groups_flat[number])
                for (parameter, at), state in zip(self._places(number), of, strict=True):
                    if state[key].shape != parameter.shape:
                        raise ValueError(f"the optimizer's {key} is of shape {list(state[key].shape)}")
                    whole[at : at + parameter.numel()] = state[key].flatten().to(whole)
                states[number][key] = whole.chunk(self.comm.world_size)[self.comm.rank].clone()
        groups = [{**group, "params": [number]} for number, group in enumerate(saved)]
        self._inner.load_state_dict(copy.deepcopy({"state": states, "param_groups": groups}))

    def _places(self, number: int) -> list[tuple[Tensor, int]]:
        """Each parameter of a group, and where it begins in the one tensor that holds them all."""
        flat = self._zero.bit16_groups_flat[number]
        start = flat.storage_offset()
        return [(p, p.storage_offset() - start) for p in self._learning[number]]


def _is_split(value: Any) -> bool:
    """Whether a state is one number for each of this rank's; counts of steps have no axis."""
    return isinstance(value, Tensor) and value.ndim == 1
