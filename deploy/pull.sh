#!/bin/sh
# pull.sh FOLDER COMMAND...: runs COMMAND, which downloads into FOLDER, and prints a progress line
# every ten seconds. A progress bar overwrites itself; a log would show it only at its end.
folder=$1
shift
output=$(mktemp)

last() { # the last lines of its output, without colours and overwritten text
  tr '\r' '\n' <"$output" | sed 's/\x1b\[[0-9;?]*[a-zA-Z]//g' | grep . | tail -n "$1"
}

"$@" >"$output" 2>&1 &
command=$!
trap 'kill $command 2>/dev/null' TERM INT
while kill -0 $command 2>/dev/null; do
  echo "$(du -sh "$folder" | cut -f 1) downloaded | $(last 1)"
  seconds=0
  while [ $seconds -lt "${EVERY_S:-10}" ] && kill -0 $command 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
  done
done
wait $command
code=$?
if [ $code = 0 ]; then
  echo "$(du -sh "$folder" | cut -f 1) downloaded: done"
else
  last 20
  echo "failed with exit code $code; run the same command again, it continues the download"
fi
exit $code
