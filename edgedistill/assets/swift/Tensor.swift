// Arrays of numbers for SamplerTable.swift.

import Foundation

/// Numbers in row-major order; the first size is a batch of one.
public struct Tensor {
    public var shape: [Int]
    public var values: [Float]

    public init(_ shape: [Int], _ values: [Float]) {
        self.shape = shape
        self.values = values
    }

    public init(_ shape: [Int], filledWith value: Float) {
        self.init(shape, [Float](repeating: value, count: shape.reduce(1, *)))
    }

    /// The sum of what factors leave of tensors of one shape; a factor of 0 leaves nothing.
    static func sum(_ terms: [(Double, Tensor)]) -> Tensor {
        var total: Tensor?
        for (factor, tensor) in terms where factor != 0 {
            let scale = Float(factor)
            if var values = total?.values {
                for i in values.indices { values[i] += tensor.values[i] * scale }
                total = Tensor(tensor.shape, values)
            } else {
                total = Tensor(tensor.shape, tensor.values.map { $0 * scale })
            }
        }
        return total ?? Tensor(terms[0].1.shape, filledWith: 0)
    }

    func clamped(_ range: [Double]) -> Tensor {
        let low = Float(range[0]), high = Float(range[1])
        return Tensor(shape, values.map { min(max($0, low), high) })
    }

    /// Change height and width by a whole factor: nearest neighbours up, means of areas down.
    func resized(_ height: Int, _ width: Int) -> Tensor {
        let (channels, oldHeight, oldWidth) = (shape[1], shape[2], shape[3])
        let (high, wide) = (max(oldHeight / height, 1), max(oldWidth / width, 1))
        var result = Tensor([1, channels, height, width], filledWith: 0)
        for c in 0..<channels {
            for y in 0..<height {
                for x in 0..<width {
                    var mean = 0.0
                    let (top, left) = (y * oldHeight / height, x * oldWidth / width)
                    for i in 0..<high {
                        for j in 0..<wide {
                            mean += Double(values[(c * oldHeight + top + i) * oldWidth + left + j])
                        }
                    }
                    result.values[(c * height + y) * width + x] = Float(mean / Double(high * wide))
                }
            }
        }
        return result
    }

    /// One place of the axis behind the batch, without that axis.
    func slice(_ index: Int) -> Tensor {
        let rest = Array(shape.dropFirst(2))
        let count = rest.reduce(1, *)
        return Tensor([1] + rest, Array(values[(index * count)..<((index + 1) * count)]))
    }

    /// Both tensors side by side on the last axis.
    func beside(_ other: Tensor) -> Tensor {
        let (mine, theirs) = (shape[shape.count - 1], other.shape[other.shape.count - 1])
        var joined: [Float] = []
        for line in 0..<(values.count / mine) {
            joined += values[(line * mine)..<((line + 1) * mine)]
            joined += other.values[(line * theirs)..<((line + 1) * theirs)]
        }
        return Tensor(Array(shape.dropLast()) + [mine + theirs], joined)
    }
}
