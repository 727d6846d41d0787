#!/bin/sh
# part.sh NAME BUDGET COMMAND...: run a part of the tests, then a line that says its time against its budget, both in
# seconds of two idle cores. Over the budget is no failure: a busy machine is no fault.
name=$1 budget=$2
shift 2
began=$(date +%s)
"$@"
status=$?
echo "part $name: $(($(date +%s) - began)) s, budget $budget s"
exit $status
