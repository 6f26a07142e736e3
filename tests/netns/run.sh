#!/usr/bin/env bash
# Hosts are killed and cut off under the streams of one model that several of them share: run.sh --help
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-.venv/bin/python}" -m tests.netns "$@"
