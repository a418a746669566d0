# What is built through the hook to record its conversations.
let
  make = name: script: more:
    derivation ({
      inherit name;
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-ec" script ];
    } // more);
in
{
  built = make "built" "echo from the builder; cat $input > $out; echo $out > $dev" {
    input = builtins.toFile "input" "some text\n";
    outputs = [ "out" "dev" ];
    requiredSystemFeatures = [ "big" "foo" ];
  };
  failing = make "failing" "echo something is wrong; exit 3" { };
  foreign = make "foreign" "echo > $out" { system = "none-such"; requiredSystemFeatures = [ "foo" ]; };
}
