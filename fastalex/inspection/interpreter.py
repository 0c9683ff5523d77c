"""Triton's interpreter with any NumPy."""

import functools

import triton


@functools.cache
def mend():
    """Triton before 3.7 takes int() of an array of one element for a scalar, which NumPy refuses from 2.4 on."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
