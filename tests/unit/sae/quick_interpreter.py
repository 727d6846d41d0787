"""Triton's interpreter without what it does over and over: its time goes into types, shapes and patches, and hardly
into numbers.

Imported once TRITON_INTERPRET is set. The numbers stay the same, bit for bit; where something is remembered, triton's
own code has made it.
"""

import dataclasses

import triton
from triton.language import core, semantic
from triton.runtime import interpreter


def hasten() -> None:
    patch_once()
    forget_overflows()
    remember_types()


def patch_once() -> None:
    """The interpreter patches the modules of triton's language that a function knows at its launch, and again at every
    call of a function within it, around what is patched already, some of it for good. Here a module is patched once in
    a launch, and all are restored at its end.
    """
    patch, scopes, modules_of = interpreter._patch_lang, [], {}

    def patched_once(fn):
        known = modules_of.get(fn)
        if known is None:
            known = {id(value) for value in fn.__globals__.values() if value in (triton.language, core)}
            modules_of[fn] = known
        if scopes and known <= set().union(*(modules for modules, _ in scopes)):
            return None
        scope = patch(fn)
        scopes.append((known, scope.restore))

        def restore_all():
            while scopes:
                scopes.pop()[1]()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patched_once


def forget_overflows() -> None:
    """Every sum of integers is made in 64 bits as well, and compared with the limits, for an assertion that is made
    only where the interpreter debugs: it does not.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def remember_types() -> None:
    """A tensor's shape, and what numpy calls its numbers, are worked out once for each type, and not for each tensor;
    and what is the same already is not made equal.
    """
    np_dtype, block, tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    equal, broadcast = core.dtype.__eq__, semantic.TritonSemantic.broadcast_impl_value
    unwrap, plain = core._unwrap_if_constexpr, (int, bool, float, str, type(None), core.dtype, core.tensor)
    np_dtypes, blocks, shapes = {}, {}, {}

    def remembered_np_dtype(kind):
        if kind.name not in np_dtypes:
            np_dtypes[kind.name] = np_dtype(kind)
        return np_dtypes[kind.name]

    def remembered_block(self, element_ty, shape):
        key = element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def remembered_tensor(self, handle, type):
        if type.name not in shapes:
            tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    def broadcast_if_needed(self, lhs, rhs):
        left, right = (value.type.shape.values if value.type.is_block() else None for value in (lhs, rhs))
        return (lhs, rhs) if left == right else broadcast(self, lhs, rhs)

    def unwrap_if_wrapped(o):
        return o if type(o) in plain else unwrap(o)

    interpreter._get_np_dtype = remembered_np_dtype
    core.block_type.__init__ = remembered_block
    core.tensor.__init__ = remembered_tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    semantic.TritonSemantic.broadcast_impl_value = broadcast_if_needed
    core._unwrap_if_constexpr = unwrap_if_wrapped
