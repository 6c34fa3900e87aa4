"""Native command: `lockstep build-native`, once on each machine."""

from __future__ import annotations

import sys

from lockstep.cli.shared_options import Quiet


def build_native(quiet: Quiet = False) -> None:
    """Build the parts of a step that need no interpreter: small models then train faster.

    It takes g++, or the compiler that CXX names, and half a minute. No bit depends on it.
    """
    from lockstep.native.build import build

    print(build((lambda text: None) if quiet else lambda text: print(text, file=sys.stderr)))
