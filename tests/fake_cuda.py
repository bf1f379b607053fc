"""A GPU that is not there: whole programs run 'on cuda', with its rules and the processor's numbers.

Inside `fake_cuda()` a tensor on 'cuda' is a `CudaTensor`: its values are a tensor of the processor, its device says
cuda:0. Each operation runs twice: without values on PyTorch's FakeTensorMode, which knows which operations may mix
devices and where their results lie, then with values on the processor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")
GIB = 2**30
LOWER = {"conv2d", "conv3d", "linear", "matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"}
"""Functions that autocast runs in bfloat16."""
FULL = {"group_norm", "layer_norm", "softmax", "mse_loss", "l1_loss", "log", "exp", "pow"}
"""Functions that autocast runs in float32."""
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class CudaTensor(Tensor):
    """A tensor that says it lies on cuda:0.

    PyTorch's C++ takes it for one on 'meta', the only device besides the processor whose tensors every build can
    differentiate.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda, is_meta = property(lambda self: True), property(lambda self: False)

    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.size(), **layout, device=META)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _Operations.run(func, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if value.device != CUDA or value.shape != self.shape:
            raise NotImplementedError("fake_cuda: `.data` of another device or shape.")
        self.held = value.held

    def __getitem__(self, index):
        return super().__getitem__(_indices(index))

    def __setitem__(self, index, value):
        if not isinstance(value, Tensor):
            value = CudaTensor(torch.tensor(value, dtype=self.dtype))
        super().__setitem__(_indices(index), value)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = CudaTensor(self.held.clone()).requires_grad_(self.requires_grad)
            made.__dict__ |= {key: value for key, value in self.__dict__.items() if key == "_is_param"}
            memo[id(self)] = made
        return memo[id(self)]

    def __tensor_flatten__(self):  # tells nn.Module.to to swap tensors, so that a parameter stays the same object
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return CudaTensor(tensors["held"])

    def __repr__(self):
        return f"{self.held!r} on cuda:0"

    def __format__(self, spec):
        return format(self.held, spec)

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()


def _indices(index) -> tuple:
    """An index whose lists are tensors: C++ would make these, as it would numbers, on 'meta', below any mode."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


def _is_cuda(value) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


class _Functions(TorchFunctionMode):
    """Before C++ sees a call: 'cuda' becomes 'meta', which it takes without a driver, and autocast is applied."""

    depth = 0
    """Calls in progress that have to do with the GPU: what they make on 'meta' is meant to lie on it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        ours = any(isinstance(leaf, CudaTensor) or _is_cuda(leaf) for leaf in tree_leaves((args, kwargs)))
        if not (ours or name == "cuda") or name in ("device", "_parse_to"):  # these return devices
            return func(*args, **kwargs)
        _Functions.depth += 1
        try:
            if name == "cuda":
                return args[0].to(META)
            if name in ("tensor", "as_tensor", "asarray") and _is_cuda(kwargs.get("device")):
                return func(*args, **{**kwargs, "device": None}).to(META)
            args, kwargs = tree_map(lambda value: META if _is_cuda(value) else value, (args, kwargs))
            if torch.is_autocast_enabled("cuda") and name in LOWER | FULL:
                dtype = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32
                args, kwargs = tree_map(lambda value: self.cast(value, dtype), (args, kwargs))
            made = func(*args, **kwargs)
        finally:
            _Functions.depth -= 1
        if any(type(leaf) is Tensor and leaf.is_meta for leaf in tree_leaves(made)):
            raise NotImplementedError(f"fake_cuda does not know how {name} makes tensors on a GPU.")
        return made

    @staticmethod
    def cast(value, dtype):
        fits = isinstance(value, CudaTensor) and value.dtype in (torch.float32, torch.bfloat16)
        return value.to(dtype) if fits else value


class _Operations(TorchDispatchMode):
    """Each operation, below autograd: checked without values, then run with them."""

    fake = FakeTensorMode()
    no_float64 = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    @classmethod
    def run(cls, func, args, kwargs):
        wrappers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CudaTensor)]
        device = kwargs.get("device")
        if _is_cuda(device) or (device == META and (_Functions.depth or torch._C._current_graph_task_id() != -1)):
            device = CUDA
        if not wrappers and device != CUDA:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            given = {**kwargs, "device": device} if "device" in kwargs else kwargs
            devices = iter(cls.devices(func, args, given))
            real_args, real_kwargs = tree_map(lambda v: v.held if isinstance(v, CudaTensor) else v, (args, kwargs))
            real_kwargs |= {"device": CPU if device == CUDA else device} if "device" in kwargs else {}
            real_kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
            owners = {id(wrapper.held): wrapper for wrapper in wrappers}
            result = func(*real_args, **real_kwargs)
            return tree_map(lambda v: cls.wrap(v, next(devices), owners) if isinstance(v, Tensor) else v, result)

    @classmethod
    def wrap(cls, held, device, owners):
        if device != CUDA:
            return held
        if cls.no_float64 and held.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        result = owners[id(held)] if id(held) in owners else CudaTensor(held)
        if result.shape != held.shape:
            raise NotImplementedError("fake_cuda: an operation that changes a tensor's shape in place.")
        return result

    @classmethod
    def devices(cls, func, args, kwargs) -> list[torch.device]:
        """Where the tensors that an operation returns lie.

        Raises:
            RuntimeError: a GPU would refuse this mixture of devices.
        """
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        place = kwargs.get("device") or (CUDA if any(t.is_cuda for t in tensors.values()) else CPU)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != place.type:
            raise RuntimeError(f"Expected a '{place.type}' device type for generator but found '{generator.device}'")
        indices = args[1] if func.overloadpacket in INDEXED else []
        if any(t is not None and t.is_cuda and not args[0].is_cuda for t in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        try:
            with cls.fake:
                twins = {
                    key: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
                    for key, t in tensors.items()
                }
                fake_args, fake_kwargs = tree_map(lambda v: twins.get(id(v), v), (args, kwargs))
                made = func(*fake_args, **{**fake_kwargs, "generator": None} if generator else fake_kwargs)
            return [leaf.device for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        except Exception as error:  # an operation whose result's shape depends on values, or that has no fake
            if "device" in str(error) and "not linked" not in str(error):
                raise RuntimeError(f"{func}: {error}") from None
        free = {id(t) for t in tensors.values() if not t.is_cuda and (t.ndim == 0 or any(t is i for i in indices))}
        if len({t.device for key, t in tensors.items() if key not in free}) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but got cpu and cuda:0")
        return [place] * 100


@contextmanager
def fake_cuda(*, no_float64: bool = False) -> Iterator[None]:
    """One GPU of 16 GiB; with `no_float64` it refuses double precision, as Apple's does."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "fake",
        "is_bf16_supported": True,
        "get_device_capability": (8, 0),
        "mem_get_info": (8 * GIB, 16 * GIB),
        "memory_allocated": GIB,
        "memory_reserved": GIB,
        "max_memory_allocated": GIB,
        "is_current_stream_capturing": False,
        **dict.fromkeys(["synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"]),
    }
    patches = {name: mock.Mock(return_value=value) for name, value in answers.items()}
    with (
        mock.patch.multiple(torch.cuda, **patches),
        mock.patch.object(_Operations, "no_float64", no_float64),
        _Functions(),
        _Operations(),
    ):
        yield
