# Sourced by the scripts beside it: `environment DIR REQUIREMENT` makes a virtual environment, or keeps a current one.

environment() {
  local dir=$1 requirement=$2 stamp
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
    return 1
  }
  stamp="$requirement $(cksum < setup.py)"
  if [ "$(cat "$dir/installed" 2>/dev/null)" != "$stamp" ]; then
    echo "installing into $dir"
    "${PYTHON:-python3}" -m venv "$dir"
    "$dir/bin/pip" install --quiet --disable-pip-version-check --editable "$requirement"
    echo "$stamp" > "$dir/installed"
  fi
}
