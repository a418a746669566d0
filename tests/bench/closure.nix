# A derivation whose .drv has a large closure: a tree of derivations, ten inputs to each. What stands at its ends was made
# from one large source, which nothing else needs.
{ big, count, system }:
let
  shell = name: script: attrs: derivation ({
    inherit name system;
    builder = "/bin/sh";
    args = [ "-ec" script ];
  } // attrs);
  end = shell "end" "wc -c < $src > $out" { src = big; };
  node = number:
    let
      first = 10 * number + 1;
      children = builtins.genList (offset: builtins.elemAt nodes (first + offset))
        (if first >= count then 0 else if first + 10 > count then count - first else 10);
    in shell "node-${toString number}" "for input in $inputs; do cat $input; done > $out" {
      inputs = if children == [ ] then [ end ] else children;
    };
  nodes = builtins.genList node count;
in builtins.head nodes
