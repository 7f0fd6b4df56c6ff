#!/bin/sh
# Compile the packages for Apple's Swift package, then run the golden probes through what was compiled, with Core
# ML itself.
#
#   sh coreml/compile_on_mac.sh [ane|gpu|cpu|all] [ARTIFACT]
#
# Needs macOS with Xcode and `pip install "edgedistill[coreml]"`. It was written on Linux and has not been
# run on a Mac. It leaves compiled models in Resources/, links to them beside the packages, by which they are found
# to be verified, and in report.json what `edgedistill parity` reports. Where the bundle holds further Core ML
# artifacts, which are not compiled here, name the one whose packages these are, such as coreml-float16.
# A ControlNet is opened with `controlNet: ["Control"]`, and called with a guidance scale of 1 (none) or more.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"

compile() {
    for package in packages/$1.mlpackage; do
        [ -d "$package" ] || return 0
        place=$(mktemp -d)
        xcrun coremlcompiler compile "$package" "$place"
        mkdir -p "$(dirname "Resources/$2")"
        rm -rf "Resources/$2.mlmodelc"
        mv "$place"/*.mlmodelc "Resources/$2.mlmodelc"
        rmdir "$place"
        ln -sfn "../Resources/$2.mlmodelc" "${package%.mlpackage}.mlmodelc"
    done
}

compile "Stable_Diffusion_version_*_text_encoder" TextEncoder
compile "Stable_Diffusion_version_*_text_encoder_2" TextEncoder2
compile "Stable_Diffusion_version_*_unet" Unet
compile "Stable_Diffusion_version_*_control-unet" ControlledUnet
compile "Stable_Diffusion_version_*_vae_decoder" VAEDecoder
compile "Stable_Diffusion_version_*_vae_encoder" VAEEncoder
compile ControlNet_control controlnet/Control

edgedistill parity .. --runtime coreml --device "${1:-all}" --compiled --json ${2:+--artifact "$2"} > report.json
