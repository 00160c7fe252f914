#!/bin/sh
# Make a virtual environment; on a Debian without python3-venv, install that first (as root) or say so.
set -eu
python=$1 folder=$2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Outrider needs Python 3.11 or later; $python is $("$python" -V 2>&1). Try: make PYTHON=python3.11" >&2
  exit 1
}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing python3-venv"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
  else
    echo "Python's venv module is missing. As root: apt-get install python3-venv" >&2
    exit 1
  fi
fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
