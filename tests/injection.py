"""How tests inject a fault into a process: conftest.run takes faults.nan_loss_at(2) as its `patch`, as do
documents.prepare and Preparation. Two patches are joined with +."""

import functools
import os
import signal

HERE = os.path.dirname(os.path.abspath(__file__))


def literal(value):
    """Return the source of a value; that of a signal is its number."""
    if isinstance(value, signal.Signals):
        value = int(value)
    return repr(value)


def injected(function):
    """Make a function return the program that calls it in another process, instead of being called here."""

    @functools.wraps(function)
    def program(*args, **options):
        arguments = [literal(value) for value in args]
        arguments += [f"{key}={literal(value)}" for key, value in options.items()]
        setup = f"import sys; sys.path.append({HERE!r}); import {function.__module__} as faults"
        return f"{setup}; faults.{function.__name__}.__wrapped__({', '.join(arguments)})\n"

    return program


def before_call(owner, name, action):
    """Call action(number) before each call of owner.name, whose calls are counted from 1."""
    real = getattr(owner, name)
    number = 0

    def counted(*args, **options):
        nonlocal number
        number += 1
        action(number)
        return real(*args, **options)

    setattr(owner, name, counted)


def own_os(module):
    """Give a module a copy of the module os, so that a change of it reaches that module only."""
    module.os = type(os)("os")
    module.os.__dict__.update(os.__dict__)
    return module.os
