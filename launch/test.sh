#!/usr/bin/env bash
# The whole test suite in an environment of its own. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment .venv-test '.[test]'
exec .venv-test/bin/python -m pytest -q -n 2 --dist loadfile tests "$@"
