"""Prints the requirements of the package and of the extras named, one a line (control path; used by the Makefile).

With it an extra is installed without building the extensions again, and lint needs no build at all.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted, seen, todo = [*project["dependencies"]], set(), sys.argv[1:]
while todo:
    extra = todo.pop()
    if extra in seen:
        continue
    seen.add(extra)
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        if own:
            todo += own[1].split(",")
        else:
            wanted.append(requirement)
print("\n".join(dict.fromkeys(wanted)))
