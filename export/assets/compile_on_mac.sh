#!/bin/sh
# Compile the packages for Apple's Swift package, then run the golden probes with Core ML itself.
#
#   sh coreml/compile_on_mac.sh [ane|gpu|cpu|all]
#
# Needs macOS with Xcode and `pip install "edgedistill[coreml]"`. It was written on Linux and has not been
# run on a Mac. It leaves compiled models in Resources/, and in report.json what `edgedistill parity` reports.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"

compile() {
    package="packages/Stable_Diffusion_version_model_$1.mlpackage"
    [ -d "$package" ] || return 0
    place=$(mktemp -d)
    xcrun coremlcompiler compile "$package" "$place"
    rm -rf "Resources/$2.mlmodelc"
    mv "$place"/*.mlmodelc "Resources/$2.mlmodelc"
    rmdir "$place"
}

compile text_encoder TextEncoder
compile text_encoder_2 TextEncoder2
compile unet Unet
compile vae_decoder VAEDecoder
compile vae_encoder VAEEncoder

edgedistill parity .. --runtime coreml --device "${1:-all}" --json > report.json
