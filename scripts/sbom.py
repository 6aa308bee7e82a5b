"""Write what the installed package brings along: a software bill of materials (CycloneDX), or a plain list.

    python scripts/sbom.py --extras serve,openvino --out sbom.json
    python scripts/sbom.py --extras serve,openvino --list

Only what the chosen extras need at run time is in it, found through the metadata of the installed packages; tools for
development are not. Nothing is looked up on the network: whoever has a database of vulnerabilities checks the file
against it, offline (`grype sbom:sbom.json`) or not (`pip-audit -r`, with the list).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "sagittal"
NIIVUE, NIIVUE_LICENCE = "niivue.umd.js", "NIIVUE_LICENSE.txt"


def closure(extras: frozenset[str]) -> dict[str, str]:
    """Return name -> version of everything that the package needs with these extras, itself included."""
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(ROOT, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(
                f"{name}: is needed and not installed, so nothing can be said of it. Install it."
            ) from None
        found[name] = installed.version
        for text in installed.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    return found


def bill(wanted: dict[str, str]) -> dict[str, Any]:
    """Return the bill of the whole environment, cut down to what is wanted."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--of", "JSON", "-o", "-"]
    whole = json.loads(subprocess.run([*command, sys.executable], check=True, capture_output=True).stdout)
    # One that is installed from its source tree may be listed twice.
    unlike = {(each["name"], each["version"]): each for each in whole["components"]}
    kept = [each for each in unlike.values() if canonicalize_name(each["name"]) in wanted]
    for component in kept:
        # Where a source tree lies on this machine is nobody's business.
        references = [
            each for each in component.get("externalReferences", ()) if not each["url"].startswith(("file:", "/"))
        ]
        component.pop("externalReferences", None)
        if references:
            component["externalReferences"] = references
    kept += vendored()
    references = {component["bom-ref"] for component in kept}
    dependencies = [
        {
            **each,
            **({"dependsOn": [ref for ref in each["dependsOn"] if ref in references]} if "dependsOn" in each else {}),
        }
        for each in whole.get("dependencies", ())
        if each["ref"] in references
    ]
    return {**whole, "components": kept, "dependencies": dependencies}


def vendored() -> list[dict[str, Any]]:
    """Return the components that lie within the package: no metadata of an installed package names them."""
    script = Path(str(distribution(ROOT).locate_file("sagittal/serve/page"))) / NIIVUE
    script = script if script.exists() else Path(__file__).parents[1] / "src" / ROOT / "serve" / "page" / NIIVUE
    if not script.exists():
        return []
    version = (script.parent / NIIVUE_LICENCE).read_text().split()[1]
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    return [
        {
            "type": "library",
            "bom-ref": "niivue",
            "name": "niivue",
            "version": version,
            "purl": f"pkg:npm/%40niivue/niivue@{version}",
            "description": "the viewer of the page, vendored",
            "hashes": [{"alg": "SHA-256", "content": digest}],
            "licenses": [{"license": {"id": "BSD-2-Clause"}}],
        }
    ]


def licence_of(component: dict[str, Any]) -> str:
    """Return what a component's metadata says of its licence, in a line."""
    told = []
    for each in component.get("licenses", ()):
        licence = each.get("license", {})
        told.append(each.get("expression") or licence.get("id") or licence.get("name") or "")
    return " / ".join(dict.fromkeys(text.splitlines()[0][:60] for text in told if text)) or "unknown"


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--extras", default="serve,openvino", help="of the package, with commas")
    parser.add_argument("--out", type=Path, default=Path("sbom.json"))
    parser.add_argument("--list", action="store_true", help="print name==version and licence instead")
    given = parser.parse_args()
    wanted = closure(frozenset(filter(None, given.extras.split(","))))
    found = bill(wanted)
    if given.list:
        for component in sorted(found["components"], key=lambda each: each["name"].lower()):
            sys.stdout.write(f"{component['name']}=={component['version']}  # {licence_of(component)}\n")
        return 0
    given.out.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    sys.stdout.write(f"{given.out}: {len(found['components'])} components, for the extras {given.extras}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
