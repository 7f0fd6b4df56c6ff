// Runs a sampler table of edgedistill (sampler.json, version 1). Foundation alone; include it in an app together
// with Tensor.swift and NormalSource.swift.
//
// A run makes one sample; every sample has its own seed, so a batch is as many runs. The arithmetic is that
// of Python's edgedistill.sampler: Float, in the same order. Property names are the keys of the JSON.

import Foundation

public enum SamplerError: Error {
    case unsupported(String)
    case missing(String)
    case outOfRange(String)
}

/// Calls the network of a name: inputs by name to outputs by name.
public typealias Network = (_ name: String, _ inputs: [String: Tensor]) throws -> [String: Tensor]

public struct SamplerTable: Decodable {
    struct Next: Decodable {
        let z, x0, raw, noise: Double
        let previous: [Double]
    }

    struct Blend: Decodable {
        let known, noise: Double
        let index: Int?
        let image, mask: String
    }

    struct Row: Decodable {
        let call: [String]
        let feeds: [String: Double]
        let in_scale: Double
        let guidance_scale: Double?
        let x0: [Double]
        let clip: [Double]?
        let next: Next
        let noise: Int?
        let blend: Blend?
    }

    /// A coefficient and what it multiplies: an index into the noise bank, or the name of a condition.
    struct Term<Item: Decodable>: Decodable {
        let coefficient: Double
        let item: Item

        init(from decoder: Decoder) throws {
            var list = try decoder.unkeyedContainer()
            coefficient = try list.decode(Double.self)
            item = try list.decode(Item.self)
        }
    }

    struct Stage: Decodable {
        let shape: [Int]
        let rows: [Row]
        let init_noise: Term<Int>
        let init_image: Term<String>?
        let carry: String?
        let carry_scale: Double
        let carry_to: String?
        let carry_noise: Term<Int>?

        var noiseCount: Int {
            let inRows = rows.map { ($0.noise == nil ? 0 : 1) + ($0.blend?.index == nil ? 0 : 1) }
            return inRows.reduce(carry_noise == nil ? 1 : 2, +)
        }
    }

    /// What stands for "no condition": a number, or a text, whose embedding the caller gives.
    enum Null: Decodable {
        case number(Float)
        case text

        init(from decoder: Decoder) throws {
            let value = try decoder.singleValueContainer()
            if let number = try? value.decode(Double.self) {
                self = .number(Float(number))
            } else {
                self = .text
            }
        }
    }

    struct Guidance: Decodable {
        let input: String?
        let `default`: Double
        let range: [Double]
        let null: [String: Null]
    }

    struct Condition: Decodable {
        let name, kind: String
        let encoder: String?
        let further: [String: String]?
    }

    struct Router: Decodable {
        let kind, on, network: String
        let table: [Int]
        let planes: [[Double]]
        let bias: [Double]
    }

    struct Space: Decodable {
        let scale, shift: Double?
    }

    public let noise_count: Int
    let spec_version: String
    let stages: [Stage]
    let state_input, raw_output: String
    let guidance: Guidance
    let conditions: [Condition]
    let router: Router?
    let clamp: [Double]?
    let space: Space
    let decoder: String?

    public static func load(_ url: URL) throws -> SamplerTable {
        let table = try JSONDecoder().decode(SamplerTable.self, from: Data(contentsOf: url))
        guard table.spec_version.hasPrefix("1.") else {
            throw SamplerError.unsupported("sampler table of version \(table.spec_version)")
        }
        return table
    }

    /// Draw the noise bank of a seed, bit for bit that of edgedistill.noise.
    public func noise(seed: UInt64) -> [Tensor] {
        var source = NormalSource(seed: seed)
        var bank: [Tensor] = []
        for stage in stages {
            for _ in 0..<stage.noiseCount {
                var entry = Tensor([1] + stage.shape, filledWith: 0)
                for i in entry.values.indices { entry.values[i] = source.next() }
                bank.append(entry)
            }
        }
        return bank
    }

    /// Run every row and return the last state, decoded where the table says so.
    ///
    /// - Parameters:
    ///   - noise: `noise_count` tensors.
    ///   - conditions: Network inputs by name; tokens of a text as `input_ids`; what stands for no text under
    ///     `null.` and the name.
    ///   - guidanceScale: In the range of the table's guidance; nil: its default.
    ///   - network: Calls a network.
    ///   - observe: Called after each row with its index and the state.
    public func run(
        noise: [Tensor],
        conditions: [String: Tensor] = [:],
        guidanceScale: Double? = nil,
        network: @escaping Network,
        observe: (Int, Tensor) -> Void = { _, _ in }
    ) throws -> Tensor {
        guard noise.count == noise_count else {
            throw SamplerError.missing("a noise bank of \(noise_count) tensors")
        }
        let given = try prepared(conditions, guidanceScale, network)
        var called = network
        if let router = router {
            let student = try routed(router, given)
            called = { try network($0 == router.network ? student : $0, $1) }
        }
        var z = noise[0]
        var index = 0
        for stage in stages {
            var inputs = given
            z = try enter(stage, z, noise, &inputs)
            var history: [Tensor] = []
            for row in stage.rows {
                let (after, x0) = try step(row, z, noise, inputs, history, guidanceScale, called)
                z = after
                history.insert(x0, at: 0)
                observe(index, z)
                index += 1
            }
        }
        if let decoder = decoder {
            let ones = Tensor(z.shape, filledWith: 1)
            let latent = Tensor.sum([(1 / (space.scale ?? 1), z), (space.shift ?? 0, ones)])
            guard let made = try network(decoder, ["latent_sample": latent]).values.first else {
                throw SamplerError.missing("the output of \(decoder)")
            }
            z = made
        }
        return clamp.map { z.clamped($0) } ?? z
    }

    /// Add embeddings of tokens, put latents in place of images, and masks in the size of the state.
    private func prepared(
        _ conditions: [String: Tensor], _ guidanceScale: Double?, _ network: Network
    ) throws -> [String: Tensor] {
        var given = conditions
        let masks = Set(stages.flatMap { $0.rows.compactMap { $0.blend?.mask } })
        for condition in self.conditions {
            if condition.kind == "text", let encoder = condition.encoder {
                let encoders = [encoder] + (condition.further ?? [:]).keys.sorted()
                for (name, value) in try embedded(condition.name, encoders, conditions, network) {
                    given[name] = value
                }
            } else if condition.kind == "image", let encoder = condition.encoder {
                let image = try find(condition.name, in: given)
                let latent = try find("latent_sample", in: network(encoder, ["sample": image]))
                let ones = Tensor(latent.shape, filledWith: 1)
                let moved = Tensor.sum([(1, latent), (-(space.shift ?? 0), ones)])
                given[condition.name] = Tensor.sum([(space.scale ?? 1, moved)])
            } else if masks.contains(condition.name) {
                let mask = try find(condition.name, in: given)
                let (height, width) = (stages[0].shape[1], stages[0].shape[2])
                if mask.shape[2] != height || mask.shape[3] != width {
                    let means = mask.resized(height, width)
                    given[condition.name] = Tensor(means.shape, means.values.map { $0 > 0 ? 1 : 0 })
                }
            }
        }
        let scale = guidanceScale ?? guidance.default
        guard scale >= guidance.range[0] && scale <= guidance.range[1] else {
            throw SamplerError.outOfRange("guidance scale \(scale), made for \(guidance.range)")
        }
        if let input = guidance.input { given[input] = Tensor([1], [Float(scale - 1)]) }
        return given
    }

    /// Return what encoders make of tokens; what two make under one name is put side by side.
    private func embedded(
        _ text: String, _ encoders: [String], _ conditions: [String: Tensor], _ network: Network
    ) throws -> [String: Tensor] {
        var made: [String: Tensor] = [:]
        for prefix in ["", "null."] {
            guard let tokens = conditions[prefix + "input_ids"] else { continue }
            for (index, encoder) in encoders.enumerated() {
                let mine = tokens.shape.count > 2 ? tokens.slice(index) : tokens
                for (name, value) in try network(encoder, ["input_ids": mine]) {
                    made[prefix + name] = made[prefix + name]?.beside(value) ?? value
                }
            }
        }
        if let null = guidance.null[text], case .number(let value) = null {
            for (name, tensor) in made { made["null." + name] = Tensor(tensor.shape, filledWith: value) }
        }
        return made
    }

    private func routed(_ router: Router, _ given: [String: Tensor]) throws -> String {
        let value = try find(router.on, in: given).values
        var student = 0
        if router.kind == "class_table" {
            guard let label = value.first, router.table.indices.contains(Int(label)) else {
                throw SamplerError.outOfRange("class \(value)")
            }
            student = router.table[Int(label)]
        } else if router.kind == "sign_planes" {
            for (bit, plane) in router.planes.enumerated() {
                var height = 0.0
                for (weight, number) in zip(plane, value) { height += weight * Double(number) }
                if height + router.bias[bit] >= 0 { student += 1 << bit }
            }
        } else {
            throw SamplerError.unsupported("router \(router.kind)")
        }
        return "\(router.network).\(student)"
    }

    private func enter(
        _ stage: Stage, _ before: Tensor, _ noise: [Tensor], _ inputs: inout [String: Tensor]
    ) throws -> Tensor {
        var terms = [(stage.init_noise.coefficient, noise[stage.init_noise.item])]
        for name in stages.compactMap({ $0.carry_to }) {
            inputs[name] = Tensor([1] + stage.shape, filledWith: 0)
        }
        if let image = stage.init_image {
            let start = try find(image.item, in: inputs)
            terms.append((image.coefficient, start))
        }
        if stage.carry != nil {
            let resized = before.resized(stage.shape[1], stage.shape[2])
            var carried = [(stage.carry_scale, resized)]
            if let fresh = stage.carry_noise { carried.append((fresh.coefficient, noise[fresh.item])) }
            if let name = stage.carry_to {
                inputs[name] = Tensor.sum(carried)
            } else {
                terms.append((1, Tensor.sum(carried)))
            }
        }
        return Tensor.sum(terms)
    }

    /// Return the state after a row, and its estimate of x (the state itself where no network is called).
    private func step(
        _ row: Row, _ z: Tensor, _ noise: [Tensor], _ given: [String: Tensor], _ history: [Tensor],
        _ guidanceScale: Double?, _ network: Network
    ) throws -> (Tensor, Tensor) {
        var x0 = z
        var terms = [(row.next.z, z)]
        if !row.call.isEmpty {
            let raw = try predict(row, z, given, guidanceScale, network)
            x0 = Tensor.sum([(row.x0[0], z), (row.x0[1], raw)])
            if let clip = row.clip { x0 = x0.clamped(clip) }
            terms += [(row.next.x0, x0), (row.next.raw, raw)]
        }
        for (factor, earlier) in zip(row.next.previous, history) { terms.append((factor, earlier)) }
        if let index = row.noise { terms.append((row.next.noise, noise[index])) }
        var after = Tensor.sum(terms)
        if let blend = row.blend {
            let image = try find(blend.image, in: given)
            var known = [(blend.known, image)]
            if let index = blend.index { known.append((blend.noise, noise[index])) }
            let kept = Tensor.sum(known)
            let mask = try find(blend.mask, in: given).values
            for i in after.values.indices {
                let drawn = mask[i % mask.count]
                after.values[i] = after.values[i] * drawn + kept.values[i] * (1 - drawn)
            }
        }
        return (after, x0)
    }

    private func predict(
        _ row: Row, _ z: Tensor, _ given: [String: Tensor], _ guidanceScale: Double?, _ network: Network
    ) throws -> Tensor {
        var inputs = given
        inputs[state_input] = Tensor.sum([(row.in_scale, z)])
        let conditional = try call(row, inputs, network)
        guard let tableScale = row.guidance_scale else { return conditional }
        for (name, value) in inputs where name.hasPrefix("null.") {
            inputs[String(name.dropFirst("null.".count))] = value
        }
        for (name, null) in guidance.null {
            if case .number(let value) = null {
                let shape = try find(name, in: given).shape
                inputs[name] = Tensor(shape, filledWith: value)
            } else {
                _ = try find("null." + name, in: given)
            }
        }
        let unconditional = try call(row, inputs, network)
        let difference = Tensor.sum([(1, conditional), (-1, unconditional)])
        return Tensor.sum([(1, unconditional), (guidanceScale ?? tableScale, difference)])
    }

    /// Call a row's networks in order, outputs of one feeding the next.
    private func call(_ row: Row, _ given: [String: Tensor], _ network: Network) throws -> Tensor {
        var inputs = given
        var outputs: [String: Tensor] = [:]
        for (name, value) in row.feeds { inputs[name] = Tensor([1], [Float(value)]) }
        for name in row.call {
            for (key, value) in try network(name, inputs) {
                inputs[key] = value
                outputs[key] = value
            }
        }
        return try find(raw_output, in: outputs)
    }

    private func find(_ name: String, in tensors: [String: Tensor]) throws -> Tensor {
        guard let found = tensors[name] else { throw SamplerError.missing(name) }
        return found
    }
}
