#!/bin/sh
# Stands in for nvcc (check_cuda_linking.rs): says its version, notes that it was asked, and makes empty files of what it is to
# compile. VERSION and ASKED are replaced.
touch "ASKED"
case " $* " in
*" --version "*)
    cat <<'END'
nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) NVIDIA Corporation
Built on a day
Cuda compilation tools, release VERSION, VVERSION.0
END
    exit
    ;;
*" --list-gpu-code "*)
    echo sm_90
    exit
    ;;
esac
folder=.
before=
for argument; do
    case $before in
    -o) touch "$argument" ;;
    --output-directory) folder=$argument ;;
    esac
    case $argument in
    *.cu) source=$argument ;;
    esac
    before=$argument
done
case " $* " in
*" --ptx "*) touch "$folder/$(basename "$source" .cu).ptx" ;;
esac
