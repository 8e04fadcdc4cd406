package javax.annotation;

/** Generated clients carry this mark, which is in a package that this test does without. */
public @interface Generated {
  String[] value();

  String date() default "";

  String comments() default "";
}
