// The noise of edgedistill's seeds, for SamplerTable.swift.

import Foundation

/// Unit Gaussian numbers, those of numpy's `Generator(Philox(key=seed)).standard_normal(dtype=float32)`.
///
/// Philox 4x64 with ten rounds (Salmon et al. 2011) feeds a ziggurat of 256 layers (Marsaglia and Tsang 2000).
public struct NormalSource {
    private var counter: UInt64 = 0
    private let key: UInt64
    private var block: [UInt64] = []
    private var high: UInt32?

    public init(seed: UInt64) {
        key = seed
    }

    public mutating func next() -> Float {
        while true {
            let bits = bits32()
            let layer = Int(bits & 0xff)
            let distance = bits >> 9
            let sign: Float = bits & 0x100 == 0 ? 1 : -1
            let x = sign * Float(distance) * Ziggurat.widths[layer]
            if distance < Ziggurat.inside[layer] { return x }
            if layer == 0 {
                // The tail has its sign from another bit.
                while true {
                    let reach = -Float(1 / Ziggurat.edge) * Float(log1p(-uniform()))
                    let drop = -Float(log1p(-uniform()))
                    if drop + drop > reach * reach {
                        let far = Float(Ziggurat.edge) + reach
                        return distance & 0x100 == 0 ? far : -far
                    }
                }
            }
            let (above, below) = (Ziggurat.heights[layer - 1], Ziggurat.heights[layer])
            let height = (above - below) * uniform() + below
            if Double(height) < exp(-0.5 * Double(x) * Double(x)) { return x }
        }
    }

    private mutating func uniform() -> Float {
        return Float(bits32() >> 8) * (1 / 16_777_216)
    }

    /// The low half of 64 bits, then the high half.
    private mutating func bits32() -> UInt32 {
        if let half = high {
            high = nil
            return half
        }
        if block.isEmpty {
            counter += 1
            block = philox()
        }
        let bits = block.removeFirst()
        high = UInt32(bits >> 32)
        return UInt32(truncatingIfNeeded: bits)
    }

    private func philox() -> [UInt64] {
        var (a, b, c, d) = (counter, UInt64(0), UInt64(0), UInt64(0))
        var (k0, k1) = (key, UInt64(0))
        for _ in 0..<10 {
            let first = UInt64(0xD2E7_470E_E14C_6C93).multipliedFullWidth(by: a)
            let second = UInt64(0xCA5A_8263_9512_1157).multipliedFullWidth(by: c)
            (a, b, c, d) = (second.high ^ b ^ k0, second.low, first.high ^ d ^ k1, first.low)
            k0 &+= 0x9E37_79B9_7F4A_7C15
            k1 &+= 0xBB67_AE85_84CA_A73B
        }
        return [a, b, c, d]
    }
}

/// Layers of equal area under exp(-x*x/2); computed in Double they round to numpy's tables.
enum Ziggurat {
    static let edge = 3.6541528853610088
    private static let area = 0.004928673233974658

    /// Where each layer ends; of the lowest, as far as a rectangle of its area would reach.
    private static let right: [Double] = {
        var x = [Double](repeating: edge, count: 256)
        for i in stride(from: 254, through: 1, by: -1) {
            x[i] = (-2 * log(area / x[i + 1] + exp(-0.5 * x[i + 1] * x[i + 1]))).squareRoot()
        }
        x[0] = area / exp(-0.5 * edge * edge)
        return x
    }()

    static let widths: [Float] = right.map { Float($0 / 8_388_608) }

    static let heights: [Float] = right.indices.map { layer -> Float in
        return layer == 0 ? 1 : Float(exp(-0.5 * right[layer] * right[layer]))
    }

    /// Below this share, of 2^23, of its width a layer lies under the curve whole.
    static let inside: [UInt32] = right.indices.map { layer -> UInt32 in
        if layer == 1 { return 0 }
        let inner = layer == 0 ? edge : right[layer - 1]
        return UInt32((inner / right[layer] * 8_388_608).rounded())
    }
}
