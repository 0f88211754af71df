"""Tools of others that are run on each scan first: what a hook is (`hook`), and how it is run (`runner`)."""

from brainfound.data.hooks.hook import PLACEHOLDERS, READY, Hook, describe, load_hooks, require_tools

__all__ = ["PLACEHOLDERS", "READY", "Hook", "describe", "load_hooks", "require_tools"]
