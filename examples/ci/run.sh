#!/usr/bin/env bash
# Run a recipe in CI: JUnit XML and a summary are written whatever comes of it, and the exit code is
# that of `spectool run`: 3 where a gate does not hold.
#
#     examples/ci/run.sh RECIPE [SECTION.OPTION=VALUE …]
#
# RUN_DIR is kept between jobs by the service's cache, so that finished stages do not run again.
set -uo pipefail
run=${RUN_DIR:-build/release} reports=${REPORTS_DIR:-build/reports}
mkdir -p "$reports"

spectool run "$@" --out "$run" --junit "$reports/junit.xml" --summary "$reports/summary.md"
code=$?
# The page of a job on GitHub.
if [[ -n ${GITHUB_STEP_SUMMARY:-} && -f $reports/summary.md ]]; then
  cat "$reports/summary.md" >> "$GITHUB_STEP_SUMMARY"
fi
exit $code
