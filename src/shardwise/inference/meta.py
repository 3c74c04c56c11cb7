from contextlib import contextmanager

from torch import nn


@contextmanager
def init_empty_weights():
    old = nn.Module.register_parameter

    def reg(self, name, param):
        old(self, name, param)
        if param is not None:
            p = self._parameters[name]
            self._parameters[name] = type(p)(p.to("meta"), requires_grad=p.requires_grad)

    nn.Module.register_parameter = reg
    try:
        yield
    finally:
        nn.Module.register_parameter = old
