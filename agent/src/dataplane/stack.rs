//! How much stack the programs need, as kernels before 6.8 count it: of a chain of functions that call one another each is
//! rounded up to 32 bytes, and 512 is the most (`check_max_stack_depth` in kernel/bpf/verifier.c). Later ones round up to 16,
//! and take programs that those refuse.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use aya_obj::{Object, generated::bpf_insn};

use super::load::OBJECT;

const MOST: usize = 512;
const STEP: usize = 32;
/// The register that points to the stack's upper end.
const FRAME: u8 = 10;
/// `call`, and the source register by which it is told that a function of the object is called (linux/bpf.h).
const CALL: u8 = 0x85;
const PSEUDO_CALL: u8 = 1;
/// `dst = src` and `dst += imm`, of 64 bits.
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;
/// The classes of instructions that load from, and store to, an address in a register.
const LOAD: u8 = 1;
const STORES: [u8; 2] = [2, 3];

/// The functions of a linked program by their first instruction: what each needs itself, and whom it calls.
type Functions = BTreeMap<usize, (usize, BTreeSet<usize>)>;

fn functions(instructions: &[bpf_insn]) -> Functions {
    let callee = |at: usize| {
        let call = &instructions[at];
        (call.code == CALL && call.src_reg() == PSEUDO_CALL)
            .then(|| at.checked_add_signed(call.imm as isize + 1).unwrap())
    };
    let mut functions = Functions::from([(0, Default::default())]);
    functions.extend((0..instructions.len()).filter_map(callee).map(|start| (start, Default::default())));
    for at in 0..instructions.len() {
        let (_, (stack, calls)) = functions.range_mut(..=at).next_back().unwrap();
        *stack = (*stack).max(reaches(instructions, at));
        calls.extend(callee(at));
    }
    functions
}

/// How far below the stack's upper end an instruction reaches.
fn reaches(instructions: &[bpf_insn], at: usize) -> usize {
    let it = &instructions[at];
    let class = it.code & 7;
    let below =
        if (class == LOAD && it.src_reg() == FRAME) || (STORES.contains(&class) && it.dst_reg() == FRAME) {
            i32::from(it.off)
        } else if it.code == ADD && is_copy_of_frame(instructions, at) {
            it.imm
        } else {
            0
        };
    usize::try_from(-below).unwrap_or(0)
}

/// Whether the register that an addition changes was the frame's before, by the last move to it.
fn is_copy_of_frame(instructions: &[bpf_insn], at: usize) -> bool {
    let register = instructions[at].dst_reg();
    let last = instructions[..at].iter().rev().find(|it| it.code == MOVE && it.dst_reg() == register);
    last.is_some_and(|it| it.src_reg() == FRAME) && instructions[at].imm >= -(MOST as i32)
}

fn depth(functions: &Functions, at: usize) -> usize {
    let (stack, calls) = &functions[&at];
    (*stack).max(1).next_multiple_of(STEP)
        + calls.iter().map(|callee| depth(functions, *callee)).max().unwrap_or(0)
}

#[test]
fn no_chain_of_functions_needs_more_stack_than_older_kernels_have() {
    let mut object = Object::parse(OBJECT).unwrap();
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections).unwrap();
    let depths: BTreeMap<&String, usize> = object
        .programs
        .iter()
        .map(|(name, program)| {
            (name, depth(&functions(&object.functions[&program.function_key()].instructions), 0))
        })
        .collect();
    assert!(depths.values().all(|depth| *depth <= MOST), "{depths:?}");
    assert!(depths.values().any(|depth| *depth > MOST / 2), "no stack found: {depths:?}");
}
