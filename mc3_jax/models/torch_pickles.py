"""Finds out what the pickle in a PyTorch file describes, without unpickling it.

A pickle is a small program that names functions and calls them with arguments of its own. Python's `pickle` is not used here,
not even a restricted version. `pickletools` only lists the opcodes, and `Pickle` interprets them with harmless values. A name
stays two strings that are never looked up, and the result of a call is a description of a tensor, a dictionary, or an object
that does nothing. So no function that a file names can run, even if this interpreter has errors.

Calls that a file of weights has no reason to make, such as to the standard library, are still refused, by an error that
names them: the file is hostile, or no file of weights. Format: `torch/serialization.py` and `torch/_utils.py` of PyTorch
(BSD-3-Clause) 1.0 to 2.13.
"""

import dataclasses
import functools
import importlib.util
import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2 → names of Python 3

import ml_dtypes
import numpy as np

DTYPES = {
    name: np.dtype(name)
    for name in (
        *("float64", "float32", "float16", "int64", "int32", "int16", "int8", "bool"),
        *("uint64", "uint32", "uint16", "uint8", "complex64", "complex128"),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_KINDS = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128", "Untyped": "uint8", "_Untyped": "uint8"},
}
_STORAGES = {f"{kind}Storage": DTYPES[name] for kind, name in _KINDS.items()}
# Classes of objects that training checkpoints hold besides the weights. A call of these gives an object that does nothing.
_INERT = {
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "builtins": {"bytes", "bytearray", "complex", "set", "frozenset", "slice", "range", "object"},
    "_codecs": {"encode"},  # bytes, in protocol 2
    "collections": {"Counter", "deque"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "numpy": {"dtype", "ndarray"},
    "torch": {"device", "Size"},
    "torch.serialization": {"_get_layout"},
    "parse_config": {"ConfigParser"},  # EgoVLP's; allowed even if its code can be imported here
}
for _module in ("pathlib", "pathlib._local"):
    _INERT[_module] = {"Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
for _module in ("numpy.core", "numpy._core"):
    _INERT |= {f"{_module}.multiarray": {"scalar", "_reconstruct"}, f"{_module}.numeric": {"_frombuffer"}}

# Libraries for the settings of runs; their objects do nothing here, whether or not the libraries are installed.
_SETTINGS = {"addict", "easydict", "munch", "omegaconf", "yacs"}
_MAX_DIMS = 64  # limit of PyTorch and NumPy
_MAX_OPCODES = 20_000_000  # A checkpoint has thousands; a file with more than this only wastes time.
# Opcodes that push their argument.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(Exception):
    """A file is refused. One line says what is wrong with it; whoever knows the file's path puts it before this line."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Name:
    """The name of a function or class in a pickle; it is never looked up."""

    module: str
    name: str

    def __str__(self):
        return ascii(f"{self.module[:60]}.{self.name[:60]}")[1:-1]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """Stands for a result of a call that is neither a dictionary nor a readable tensor; keeps only the name of its origin."""

    origin: str
    is_tensor: bool = False


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Values `start` to `start + num_values` of the raw array that the file stores under `key`."""

    key: str
    dtype: np.dtype
    start: int
    num_values: int


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view of a storage; `offset` and `strides` are in values of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple
    strides: tuple


class Pickle:
    """Interprets pickles without running any code in them.

    Attributes:
      storages: Key of each storage → its dtype, as given where it is first mentioned.
      num_opcodes: Number of opcodes interpreted so far.
    """

    def __init__(self):
        self.storages, self.num_opcodes = {}, 0

    def load(self, stream):
        """Returns the object that the next pickle in a stream describes, and leaves the stream at the end of that pickle.

        Dictionaries become dictionaries with text keys; other objects become those of the classes above, or plain values.

        Args:
          stream: Binary file.

        Raises:
          RefusedError: The pickle is too long, or would call or change something that no file of weights needs to.
          Exception: Any exception, if the pickle is damaged; still no code in it has run.
        """
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, arg, _ in pickletools.genops(stream):
            self.num_opcodes += 1
            if self.num_opcodes > _MAX_OPCODES:
                raise RefusedError(f"is a pickle of more than {_MAX_OPCODES} steps: no file of weights needs so many")
            if opcode.name == "STOP":
                break
            self._step(opcode.name, arg)
        return self.stack.pop()

    def _step(self, opcode: str, arg):
        if opcode in _LITERALS:
            self.stack.append(arg)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _PUTS:
            self.memo[arg] = self.stack[-1]
        elif opcode in _GETS:
            self.stack.append(self.memo[arg])
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif opcode == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif opcode == "GLOBAL":
            self.stack.append(_make_name(*arg.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            self.stack.append(_make_name(*self._pop(2)))
        elif opcode not in ("PROTO", "FRAME") and not self._step_container(opcode):
            self._step_call(opcode, arg)

    def _pop(self, num: int) -> list:
        if num > len(self.stack):
            raise IndexError("the pickle's stack is empty")
        items = self.stack[-num:]
        del self.stack[-num:]
        return items

    def _pop_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _step_container(self, opcode: str) -> bool:
        """Performs an opcode that makes or fills a container, or copies or drops a value; returns False for all others."""
        if opcode in ("EMPTY_LIST", "EMPTY_DICT"):
            self.stack.append([] if opcode == "EMPTY_LIST" else {})
        elif opcode in ("TUPLE", "LIST", "DICT"):
            items = self._pop_mark()
            self.stack.append({"TUPLE": tuple, "LIST": list, "DICT": _make_dict}[opcode](items))
        elif opcode == "EMPTY_SET":
            self.stack.append(Opaque("set"))
        elif opcode == "FROZENSET":
            self._pop_mark()
            self.stack.append(Opaque("frozenset"))
        elif opcode in ("APPEND", "SETITEM"):
            items = self._pop(1 if opcode == "APPEND" else 2)
            _fill(self.stack[-1], items, opcode)
        elif opcode in ("APPENDS", "SETITEMS", "ADDITEMS"):
            items = self._pop_mark()
            _fill(self.stack[-1], items, opcode)
        elif opcode == "DUP":
            self.stack.append(self.stack[-1])
        elif opcode == "POP" and self.stack:
            self.stack.pop()
        elif opcode in ("POP", "POP_MARK"):
            self._pop_mark()
        else:
            return False
        return True

    def _step_call(self, opcode: str, arg):
        if opcode == "BINPERSID":
            self.stack.append(self._make_storage(self.stack.pop()))
        elif opcode in ("REDUCE", "NEWOBJ"):
            self.stack.append(_call(*self._pop(2)))
        elif opcode == "NEWOBJ_EX":
            self.stack.append(_call(*self._pop(3)[:2]))
        elif opcode == "OBJ":
            function, *args = self._pop_mark()
            self.stack.append(_call(function, tuple(args)))
        elif opcode == "INST":
            args = tuple(self._pop_mark())
            self.stack.append(_call(_make_name(*arg.split(" ", 1)), args))
        elif opcode == "BUILD":
            self.stack.pop()  # the object's attributes, which none of our stand-ins keeps
            _refuse_to_change(self.stack[-1])
        else:  # EXT1, EXT2, EXT4 (names registered with copyreg), out-of-band buffers, persistent ids as text
            raise RefusedError(f"has the pickle opcode {opcode}, which torch.save never writes: not read")

    def _make_storage(self, pid):
        """Returns the storage to which a persistent id, a tuple, refers, or the class in a "module" entry of old files."""
        kind, value, *rest = pid
        if kind == "module":
            return value
        key, _, num_values, *view = rest
        if kind != "storage" or not isinstance(value, Name) or value.name not in _STORAGES:
            raise RefusedError(f"holds a storage of {_describe(value)}: only plain numbers are read")
        if type(key) is not str or value.module.partition(".")[0] != "torch":
            raise RefusedError(f"names a storage {_describe(key)} of {value}: damaged, download or copy it again")
        start = 0
        if view and view[0] is not None:
            _, start, num_values = view[0]  # a view of a storage, as PyTorch before 0.4 wrote them
        if not _is_sizes((start, num_values)):
            raise RefusedError("has a storage without a size: damaged, download or copy it again")
        self.storages.setdefault(key, _STORAGES[value.name])
        return Storage(key, _STORAGES[value.name], start, num_values)


def _describe(value) -> str:
    """Returns a value in a few printable characters for error messages, or only its type for a container."""
    if isinstance(value, Name | int):
        return str(value)
    return ascii(value[:80]) if isinstance(value, str) else type(value).__name__


@functools.cache
def _is_importable(top: str) -> bool:
    """Returns whether a top-level module exists in this environment; nothing is imported."""
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):  # the module is loaded but has no spec
        return True


def _is_inert(name: Name) -> bool:
    """Returns whether a file of weights may call this: a class that checkpoints hold, or one that can't be imported here."""
    if "." in name.name:
        return False  # from protocol 4 on, dots reach attributes, even `system` of the `os` that some module imports
    if name.name in _INERT.get(name.module, ()):
        return True
    top = name.module.partition(".")[0]
    if top in _SETTINGS or top == "__main__":  # __main__: a class of the script that wrote the file
        return True
    # PyTorch counts as importable even if it isn't installed, so that every machine reads or refuses the same files.
    known = top == "torch" or top in sys.stdlib_module_names or not top.isidentifier()
    return not known and not _is_importable(top)


def _make_name(module, name) -> Name:
    if type(module) is not str or type(name) is not str:
        raise RefusedError("names a function by something that is not text: damaged, download or copy it again")
    if (module, name) in NAME_MAPPING:
        return Name(*NAME_MAPPING[module, name])
    return Name(IMPORT_MAPPING.get(module, module), name)


def _is_sizes(values: tuple) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _refuse_to_change(target):
    # For a name such as `os.environ`, or a class, unpickling would set items or attributes of the real object.
    if isinstance(target, Name) and not _is_inert(target):
        raise RefusedError(f"would change {target}: not read, since opening a file of weights must change nothing")


def _fill(target, items: list, opcode: str):
    """Puts items into a list or dictionary. Keys that are neither text nor integers name no tensor and are skipped.

    Only text is hashed: hashing a tuple nested a million times would overflow the interpreter's stack and end the process.
    """
    if isinstance(target, list) and opcode.startswith("APPEND"):
        target += items
    elif isinstance(target, dict) and opcode.startswith("SETITEM"):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) in (str, int):
                target[str(key)] = value
    elif isinstance(target, Name):
        _refuse_to_change(target)
    elif not isinstance(target, Opaque):
        raise RefusedError(f"puts items into a {type(target).__name__}: damaged, download or copy it again")


def _make_dict(items: list) -> dict:
    made = {}
    _fill(made, items, "SETITEMS")
    return made


def _make_ordered_dict(pairs: list) -> dict:
    """Returns a dictionary from a list of (key, value), as Python 2 wrote ordered dictionaries, and empties the list."""
    made = _make_dict([item for key, value in pairs for item in (key, value)])
    # If the list stayed, a file could turn one long list into any number of dictionaries at the cost of a few bytes each.
    pairs.clear()
    return made


def _call(function, args):
    """Returns the object that stands for the result of a call; nothing is called.

    Raises:
      RefusedError: A file of weights has no reason to call this.
    """
    if not isinstance(args, tuple) or not isinstance(function, Name | Opaque):
        raise RefusedError(f"calls a {type(function).__name__}: damaged, download or copy it again")
    if isinstance(function, Opaque):
        return Opaque(function.origin)
    module, name = function.module, function.name
    if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        if len(args) > _MAX_DIMS:  # as for shapes in `_make_tensor`; PyTorch passes seven
            raise RefusedError(f"has a tensor made of {len(args)} values: damaged, download or copy it again")
        return _make_tensor(name, *args)
    if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return args[0]
    if module == "torch._utils" and name.startswith("_rebuild_"):
        return Opaque(f"a tensor of {function}", is_tensor=True)  # sparse, quantised or without values
    if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
        return _call(args[0], args[2])  # a tensor with attributes or of a subclass
    if module == "collections" and name in ("OrderedDict", "defaultdict"):
        return _make_ordered_dict(args[0]) if name == "OrderedDict" and args else {}
    if not _is_inert(function):
        raise RefusedError(
            f"would call {function}: not read, since opening a file of weights must run nothing; if you trust it, open it "
            "with the program that wrote it and save its state_dict alone"
        )
    return Opaque(str(function))


def _make_tensor(function: str, storage, offset, shape, strides, *rest):
    """Returns the description of the tensor that PyTorch's `function` would make from these arguments."""
    # Checked first: thousands of tensors may share one long shape, and the checks below go through it for each of them.
    if not all(isinstance(sizes, tuple | list) and len(sizes) <= _MAX_DIMS for sizes in (shape, strides)):
        raise RefusedError(f"has a tensor of more than {_MAX_DIMS} dimensions: damaged, download or copy it again")
    if not isinstance(storage, Storage) or not _is_sizes((offset, *shape, *strides)) or len(shape) != len(strides):
        raise RefusedError("has a tensor without a storage or sizes: damaged, download or copy it again")
    dtype, metadata = storage.dtype, rest[2:]
    if function == "_rebuild_tensor_v3":
        dtype, metadata = DTYPES.get(rest[2].name), rest[3:]
        if dtype is None:
            return Opaque(f"a tensor of {rest[2]}", is_tensor=True)
    if any(metadata):
        return Opaque("a conjugated or negated view", is_tensor=True)
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))
