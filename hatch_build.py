"""What hatchling does for a wheel beside copying files: it compiles the kernels' variants, where there is a compiler.

The wheel is then for one kind of machine, the compiler's (so CC may be a cross compiler). Without a compiler, or with
OPENCOLA_KERNELS=0 in the environment, it is for all machines and has no kernels; so are checkouts, which compile their
own.
"""

import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):
    """Adds `opencola/kernels/prebuilt/*.so` to a wheel, and to its name the platform that they are for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before files are collected."""
        if version == "editable" or os.environ.get("OPENCOLA_KERNELS") == "0":
            return
        build = runpy.run_path(str(Path(self.root, "opencola", "kernels", "build.py")))
        self.made = tempfile.TemporaryDirectory()
        try:
            files, platform = build["compile_variants"](Path(self.made.name))
        except build["NotCompiled"] as error:
            self.app.display_warning(f"no kernels in this wheel: {error}")
            return
        build_data["force_include"] |= {str(file): f"opencola/kernels/prebuilt/{file.name}" for file in files}
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled, now that it is in the wheel."""
        if hasattr(self, "made"):
            self.made.cleanup()
