// Golden vectors of edgedistill: that SamplerTable.swift does what Python does.
//
// Add all four Swift files and golden.json to a test target; golden.json is looked for beside this file.

import Foundation
import XCTest

final class SamplerTableTests: XCTestCase {
    struct Given: Decodable {
        let shape: [Int]
        let values: [Float]

        /// The values are repeated until the shape is full.
        var tensor: Tensor {
            var result = Tensor(shape, filledWith: 0)
            for i in result.values.indices { result.values[i] = values[i % values.count] }
            return result
        }
    }

    /// Every `stride`-th value of a longer list.
    struct Strided: Decodable {
        let shape: [Int]?
        let stride: Int
        let values: [Float]
    }

    struct Stream: Decodable {
        let seed: UInt64
        let count, stride: Int
        let values: [Float]
    }

    struct Case: Decodable {
        let name: String
        let table: SamplerTable
        let seed: UInt64
        let conditions: [String: Given]
        let noise: Strided
        let output: Strided
    }

    struct Golden: Decodable {
        let noise: Stream
        let cases: [Case]
    }

    func golden() throws -> Golden {
        let file = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        let data = try Data(contentsOf: file.appendingPathComponent("golden.json"))
        return try JSONDecoder().decode(Golden.self, from: data)
    }

    func testNoiseIsNumpys() throws {
        let stream = try golden().noise
        var source = NormalSource(seed: stream.seed)
        var all: [Float] = []
        for _ in 0..<stream.count { all.append(source.next()) }
        check(all, stream.stride, stream.values, "noise")
    }

    func testTablesMakeTheSameSamples() throws {
        for item in try golden().cases {
            let noise = item.table.noise(seed: item.seed)
            check(noise.flatMap { $0.values }, item.noise.stride, item.noise.values, item.name + ", noise")
            let table = item.table
            let made = try table.run(
                noise: noise,
                conditions: item.conditions.mapValues { $0.tensor },
                network: { name, inputs in SamplerTableTests.standIn(name, inputs, table) }
            )
            XCTAssertEqual(made.shape, item.output.shape, item.name)
            check(made.values, item.output.stride, item.output.values, item.name)
        }
    }

    func check(_ found: [Float], _ stride: Int, _ expected: [Float], _ name: String) {
        XCTAssertEqual((found.count + stride - 1) / stride, expected.count, name)
        for (i, value) in expected.enumerated() {
            let tolerance = 1e-5 * max(1, abs(value))
            XCTAssertEqual(found[i * stride], value, accuracy: tolerance, "\(name), value \(i * stride)")
        }
    }

    /// What stands for a network: a bounded function of its state and of the first value of its other inputs.
    static func standIn(
        _ name: String, _ inputs: [String: Tensor], _ table: SamplerTable
    ) -> [String: Tensor] {
        let gain = Float(0.5 + 0.01 * Double(name.utf8.last! % 16))
        let text = table.conditions.first { $0.kind == "text" }
        if let text = text, text.encoder == name || text.further?[name] != nil {
            let tokens = inputs["input_ids"]!
            let values = tokens.values.map { $0 * gain * 0.01 }
            return [text.name: Tensor(tokens.shape + [1], values)]
        }
        if let image = inputs["sample"], name.hasPrefix("vae_encoder") {
            var latent = Tensor([1] + table.stages[0].shape, filledWith: 0)
            for i in latent.values.indices {
                latent.values[i] = image.values[i % image.values.count] * 0.5
            }
            return ["latent_sample": latent]
        }
        if let latent = inputs["latent_sample"] {
            return ["sample": Tensor(latent.shape, latent.values.map { $0 * 0.5 })]
        }
        let state = inputs[table.state_input]!
        if name == "guide" {
            return ["residual": Tensor(state.shape, state.values.map { $0 * 0.1 })]
        }
        let others = inputs.keys.filter { $0 != table.state_input && !$0.hasPrefix("null.") }
        var bias: Float = 0
        for (place, other) in others.sorted().enumerated() {
            let first = inputs[other]!.values[0]
            bias += Float(0.1 * Double(place + 1)) * first / (10 + abs(first))
        }
        let raw = state.values.map { $0 * gain / (1 + abs($0)) + bias }
        return [table.raw_output: Tensor(state.shape, raw)]
    }
}
