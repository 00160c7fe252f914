"""`tables/introspected.txt`: functions of installed Python packages, by signature and first sentence of docstring.

The table is committed, so that examples do not depend on what is installed; run this module to write it anew.
Invariant: a function is taken when each of its required parameters has a name that says what may stand there.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator

from models.toolcaller.data.values import TABLES

LISTS = {name: "[nums]" for name in ("x", "y", "x1", "x2", "m", "u", "v")}
MATRIX = {name: "[[coef]]" for name in ("a", "x", "x1", "x2")}
# module: domain, and what its parameter names mean where that differs from TYPES
MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "math": ("math", {}),
    "numpy": ("numpy", LISTS),
    "numpy.linalg": ("numpy", MATRIX),
    "scipy.stats": ("scipy", LISTS),
    "scipy.spatial.distance": ("scipy", {}),
    "scipy.signal.windows": ("scipy", {}),
    "skimage.color": ("skimage", {"rgb": "photo", "hsv": "photo", "lab": "photo"}),
    "skimage.exposure": ("skimage", {}),
    "skimage.filters": ("skimage", {}),
    "calendar": ("calendar_tools", {}),
    "textwrap": ("text_tools", {}),
}
TYPES = {
    "path": "path", "year": "year", "month": "monthn", "text": "sentence", "width": "smallint", "image": "photo",
    "n": "int", "k": "smallint", "m": "int", "N": "int", "M": "int", "a": "[nums]", "data": "[nums]", "x": "num",
    "y": "num", "u": "[nums3]", "v": "[nums3]", "p": "[signed2]", "q": "[signed2]", "alpha": "prob", "beta": "prob",
}  # fmt: skip
VERBS = {"Calculates": "calculate", "Computes": "compute", "Returns": "return", "Return": "give me"}
VERBS |= {
    verb.capitalize(): verb for verb in ("apply", "find", "compute", "calculate", "perform", "estimate", "convert")
}
# in the tables by hand, or not clear from the names of their parameters
SKIPPED = """
mean median std var sum prod comb perm gcd lcm factorial sort det dot vecdot outer correlation ceil cov diagonal
bayes_mvs binomtest binned_statistic binned_statistic_2d dice directed_hausdorff boxcox corrcoef general_cosine
bartlett blackman eigvalsh convolve jaccard rogerstanimoto russellrao yule sokalsneath monthcalendar
"""
LIMIT = 9


def lines() -> Iterator[str]:
    """The lines of the table."""
    seen = set(SKIPPED.split())
    for module, (domain, meanings) in MODULES.items():
        yield f"[{domain}]"
        taken = 0
        for name, function in sorted(vars(importlib.import_module(module)).items()):
            line = (
                ""
                if name.startswith("_") or name.lower() in seen or taken >= LIMIT
                else _line(name, function, domain, TYPES | meanings)
            )
            if line:
                seen.add(name.lower())
                taken += 1
                yield line


def _line(name: str, function: object, domain: str, types: dict[str, str]) -> str:
    if not callable(function) or inspect.isclass(function) or not name.islower():
        return ""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return ""
    required = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind in (0, 1)]
    if not 1 <= len(required) <= 4 or any(p.name not in types for p in required):
        return ""
    doc = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    sentence = re.split(r"\.\s|\.$", doc)[0].strip()
    good = re.fullmatch(r"[A-Z][a-z]+ [A-Za-z0-9 ,'-]{12,90}", sentence)
    if not good or re.search(r"\b(array|elements?|axis|axes|None|input|self|ndarray|object|iterable)\b", sentence):
        return ""
    params = " ".join(f"{p.name}:{types[p.name]}" for p in required)
    head, _, rest = sentence.partition(" ")
    verb = VERBS.get(head, head.lower())
    if verb not in VERBS.values():
        return ""
    return f"~{domain}_py {domain}_{name.lower()} ;; {params} ;; V {verb} {rest} ;; {sentence}."


def main() -> None:
    """Write the table."""
    header = "# Written by introspect.py out of the packages' own signatures and docstrings (PSF and BSD licences)."
    (TABLES / "introspected.txt").write_text("\n".join([header, *lines()]) + "\n")


if __name__ == "__main__":
    main()
