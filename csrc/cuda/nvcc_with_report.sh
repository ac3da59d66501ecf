#!/bin/sh
# nvcc, for PYTORCH_NVCC: what it and ptxas say of object x.o goes into x.ptxas.txt beside it, with nvcc's version at the
# end, for benchmarks/resources.py. Where it fails it says so here.
previous=
for argument; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
report=${object%.o}.ptxas.txt
nvcc=${CUDA_HOME:?}/bin/nvcc
if "$nvcc" "$@" -Xptxas -v > "$report.part" 2>&1; then
  "$nvcc" --version >> "$report.part"
  mv "$report.part" "$report"
else
  cat "$report.part"
  rm "$report.part"
  exit 1
fi
