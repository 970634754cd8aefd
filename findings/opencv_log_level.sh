#!/usr/bin/env bash
# Silencing OpenCV's log from Python, from 4.12 to 4.13.
#
# Versions: opencv-python-headless 4.12.0.88, 4.13.0.92 and 5.0.0.93, numpy 2.2.6.
# Good guess: a call that works in 4.12 works in 4.13; what goes away in OpenCV 5 is there beside its successor before.
# Behaviour: cv2.setLogLevel and cv2.getLogLevel are gone in 4.13, a minor release. Their successor, cv2.utils.logging, is
#   not there before 4.13. So neither call runs in both: AttributeError at import, for a library that calls it there.
# For users: "opencv-python>=4.12" is no bound for code that uses one of the two. This project needs 4.13 for that alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 4.12.0.88 4.13.0.92 5.0.0.93; do
  "$folder/venv/bin/pip" install --quiet "opencv-python-headless==$version" numpy==2.2.6
  "$folder/venv/bin/python" - <<'PYTHON'
import cv2

ways = {
    "cv2.setLogLevel": lambda: cv2.setLogLevel(2),
    "cv2.utils.logging.setLogLevel": lambda: cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR),
}
for name, way in ways.items():
    try:
        way()
        print(cv2.__version__, name, "works")
    except AttributeError as error:
        print(cv2.__version__, f"{name}: AttributeError: {error}")
PYTHON
done | tee "$folder/seen"
expected="4.12.0 cv2.setLogLevel works
4.12.0 cv2.utils.logging.setLogLevel: AttributeError: module 'cv2.utils' has no attribute 'logging'
4.13.0 cv2.setLogLevel: AttributeError: module 'cv2' has no attribute 'setLogLevel'
4.13.0 cv2.utils.logging.setLogLevel works
5.0.0 cv2.setLogLevel: AttributeError: module 'cv2' has no attribute 'setLogLevel'
5.0.0 cv2.utils.logging.setLogLevel works"
[ "$(cat "$folder/seen")" = "$expected" ] || { echo 'the behaviour has changed' >&2; exit 1; }
# Output seen (2026-12-01, Python 3.11):
#   4.12.0 cv2.setLogLevel works
#   4.12.0 cv2.utils.logging.setLogLevel: AttributeError: module 'cv2.utils' has no attribute 'logging'
#   4.13.0 cv2.setLogLevel: AttributeError: module 'cv2' has no attribute 'setLogLevel'
#   4.13.0 cv2.utils.logging.setLogLevel works
#   5.0.0 cv2.setLogLevel: AttributeError: module 'cv2' has no attribute 'setLogLevel'
#   5.0.0 cv2.utils.logging.setLogLevel works
