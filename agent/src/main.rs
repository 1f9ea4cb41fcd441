fn main() {
    println!("{}", include_bytes!(concat!(env!("OUT_DIR"), "/loden-programs")).len());
}
